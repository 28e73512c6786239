// The theme asks unpkg.com for mermaid, and where that cannot be reached the search of the page dies with it. It asks for
// nothing when `mermaid` is there: this one fetches the real one when a drawing is to be made, or shows its source.
window.mermaid = {
  initialize(settings) {
    this.settings = settings;
  },
  async render(id, source) {
    try {
      const { default: real } = await import("https://unpkg.com/mermaid@11/dist/mermaid.esm.min.mjs");
      real.initialize(this.settings);
      return await real.render(id, source);
    } catch {
      const text = document.createElement("pre");
      text.style.whiteSpace = "pre-wrap";
      text.textContent = source;
      return { svg: text.outerHTML };
    }
  },
};
