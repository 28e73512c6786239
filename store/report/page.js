"use strict";
// Draws the charts from the data in the page, follows light and dark, and lets pointer and keys walk the map.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const settings = { displayModeBar: false, responsive: true, displaylogo: false };
  const palette = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#B8A800",
                   "#7B4FB5", "#1B9E9E", "#A65628", "#4D6A00"];
  const symbols = ["circle", "diamond", "square", "triangle-up", "cross", "x", "star"];
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function themed(layout) {
    const changed = structuredClone(layout);
    changed.font = { ...changed.font, color: color("--ink"), family: getComputedStyle(document.body).fontFamily, size: 13 };
    changed.hoverlabel = { bgcolor: color("--panel"), bordercolor: color("--soft"), font: { color: color("--ink") } };
    for (const axis of ["xaxis", "yaxis"]) {
      changed[axis] = { ...changed[axis], gridcolor: color("--line"), zerolinecolor: color("--line"),
                        linecolor: color("--line"), tickcolor: color("--line"), fixedrange: true };
    }
    return changed;
  }

  function drawAll() {
    for (const place of document.querySelectorAll("[data-chart]")) {
      const chart = data.charts[place.dataset.chart];
      Plotly.react(place, chart.data, themed(chart.layout), settings);
    }
    drawMap();
  }

  const place = document.getElementById("chart-map");
  const card = document.getElementById("card");
  let order = []; // of the map's points as the keys walk them: [trace, point, row]
  let at = -1;

  function option(select, value, text) {
    const element = document.createElement("option");
    element.value = value;
    element.textContent = text;
    select.append(element);
  }

  function paragraph(text, className) {
    const element = document.createElement("p");
    element.textContent = text; // text, never markup
    if (className) element.className = className;
    card.append(element);
  }

  function show(row) {
    const sample = data.map.samples[row];
    card.replaceChildren();
    if (sample.thumbnail) {
      const picture = document.createElement("img");
      picture.src = "data:image/jpeg;base64," + sample.thumbnail;
      picture.alt = "Image of row " + row;
      card.append(picture);
    } else {
      paragraph(sample.no_picture, "none");
    }
    paragraph(sample.key + " (row " + row + ")");
    paragraph(sample.caption || "no caption");
    paragraph(sample.modality + ", " + sample.status + (sample.reason ? ": " + sample.reason : ""), "none");
  }

  function drawMap() {
    if (!place) return;
    const found = data.map.projections[Number(document.getElementById("map-space").value)];
    const values = data.map.colors[document.getElementById("map-color").value];
    const counts = new Map();
    for (const row of found.rows) counts.set(values[row], (counts.get(values[row]) || 0) + 1);
    const names = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || (a < b ? -1 : 1));
    const kept = names.length > 12 ? names.slice(0, 11) : names;
    const rest = (names.length - kept.length) + " other values";
    const groups = new Map([...kept, ...(names.length > 12 ? [rest] : [])].map((name) => [name, []]));
    found.rows.forEach((row, i) => groups.get(kept.includes(values[row]) ? values[row] : rest).push(i));
    order = [];
    const traces = [...groups].map(([name, members], t) => {
      members.forEach((i, p) => order.push([t, p, found.rows[i]]));
      return {
        type: "scatter", mode: "markers", name: plain(name), x: members.map((i) => found.x[i]), y: members.map((i) => found.y[i]),
        customdata: members.map((i) => found.rows[i]), hovertemplate: "row %{customdata}<extra></extra>",
        marker: { color: palette[t % palette.length], symbol: symbols[t % symbols.length], size: found.rows.length < 50 ? 11 : 7, opacity: 0.85 },
      };
    });
    at = -1;
    const layout = themed({
      margin: { l: 10, r: 10, t: 10, b: 10 }, hovermode: "closest", dragmode: false, showlegend: true,
      legend: { orientation: "h", y: -0.02, yanchor: "top" }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: { showticklabels: false, zeroline: false }, yaxis: { showticklabels: false, zeroline: false },
    });
    Plotly.react(place, traces, layout, settings);
    const held = found.explained === null ? "Distances between groups mean nothing in a UMAP." :
      "The two principal axes hold " + (100 * found.explained).toFixed(1) + " % of the variance.";
    document.getElementById("map-note").textContent = found.rows.length + " rows. " + held;
  }

  // Plotly reads a few tags in names; a label from the store is text.
  function plain(text) {
    return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  }

  function walk(step) {
    if (!order.length) return;
    at = step === 0 ? 0 : (at + step + order.length) % order.length;
    const [trace, point, row] = order[at];
    Plotly.Fx.hover(place, [{ curveNumber: trace, pointNumber: point }]);
    show(row);
  }

  if (place) {
    const space = document.getElementById("map-space");
    const by = document.getElementById("map-color");
    data.map.projections.forEach((found, i) => option(space, i, found.teacher + (found.tower === "image" ? ", images" : ", captions")));
    for (const name of Object.keys(data.map.colors)) option(by, name, name);
    space.addEventListener("change", drawMap);
    by.addEventListener("change", drawMap);
    place.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: 0 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      walk(step);
    });
  }
  // What is folded away is printed too.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((element) => { element.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((element) => { element.open = false; }));
  drawAll();
  if (place) place.on("plotly_hover", (event) => show(event.points[0].customdata));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
})();
