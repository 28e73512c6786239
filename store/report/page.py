"""Rendering of gathered content as one HTML file with charts, script, style and a strict content security policy."""

import base64
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from shlex import quote

import jinja2
import plotly.offline
from markupsafe import Markup

from mmkd.base.errors import UserError
from mmkd.base.files import write_atomically
from mmkd.base.text import bytes_text, counted, number, percent, seconds_text
from mmkd.store.inspect.coverage import shard_ranges
from mmkd.store.inspect.pairs import modality_names
from mmkd.store.layout import TOWER_INPUTS
from mmkd.store.reader import FeatureStore
from mmkd.store.report import charts
from mmkd.store.report.content import Content, Options, gather

# Between `<script type="application/json">` and its end no `<` may stand, whatever a caption says.
_JSON_ESCAPES = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)


def write_report(
    store: FeatureStore, out: Path, options: Options, progress: Callable[[str], None] | None = None
) -> Content:
    """Write the page at `out` in one step; return its content. Raises UserError if `out` is a folder or does not end in
    .html; StoreError if it cannot be written; otherwise as `gather`."""
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UserError(f"{out} is not an HTML file; give one that ends in .html")
    content = gather(store, options, progress)
    write_atomically(out, render(content, options).encode())
    return content


def render(content: Content, options: Options) -> str:
    """Return the page. Texts of the store pass the template's escaping or are JSON without markup."""
    folder = files("mmkd.store.report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
    )
    environment.filters |= {
        "bytes": bytes_text, "seconds": seconds_text, "ranges": shard_ranges, "share": percent, "number": number,
        "counted": counted,
    }  # fmt: skip
    scripts = [plotly.offline.get_plotlyjs(), (folder / "page.js").read_text(encoding="utf-8")]
    drawn = _charts(content)
    points = {
        "projections": [charts.map_points(found) for found in content.projections],
        "samples": {row: asdict(sample) for row, sample in content.samples.items()},
        "colors": content.colors,
    }
    data = json.dumps({"charts": drawn, "map": points}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return environment.get_template("page.html.j2").render(
        content=content,
        info=content.info,
        summary=content.info.summary,
        statistics=content.statistics,
        commands=_commands(content, options),
        data=Markup(data.translate(_JSON_ESCAPES)),  # noqa: S704 - no markup is left
        charts=drawn,
        called=TOWER_INPUTS,
        scripts=[Markup(script) for script in scripts],  # noqa: S704 - ours and Plotly's, hashed in the policy
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),  # noqa: S704 - ours
        policy=_policy(scripts),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=importlib.metadata.version("mmkd"),
    )


def _charts(content: Content) -> dict[str, charts.Chart]:
    statistics = content.statistics
    found: dict[str, charts.Chart] = {}
    if content.info.coverage.teachers and content.info.coverage.rows:
        found["coverage"] = charts.coverage_chart(content.info.coverage)
    if any(tower.norms.count and not 0.99 < tower.norms.q01 <= tower.norms.q99 < 1.01 for tower in statistics.towers):
        found["norms"] = charts.norm_chart(statistics.towers)
    for pairs in statistics.pairs:
        if pairs.matched.count:
            found[f"cosine-{pairs.slug}"] = charts.cosine_chart(pairs)
    if modality_names(statistics.pairs):
        found["modality"] = charts.modality_chart(statistics.pairs)
    for matrix in statistics.agreement:
        if matrix.compared:
            found[f"cka-{matrix.tower}"] = charts.agreement_chart(matrix, matrix.cka, "linear CKA")
            mutual = f"mutual {matrix.k} neighbors"
            found[f"mutual-{matrix.tower}"] = charts.agreement_chart(matrix, matrix.mutual, mutual)
    return found


def _commands(content: Content, options: Options) -> dict[str, tuple[str, str]]:
    """Return the purpose and text of commands that print the page's numbers, by link name."""
    root = quote(content.info.summary.root)
    drawn = "" if options.sample == Options().sample else f" --sample {options.sample or 'all'}"
    drawn += f" --seed {options.seed}" if options.seed else ""
    chosen = f" --teachers {','.join(options.teachers)}" if options.teachers else ""
    projection = "" if options.projection == Options().projection else f" --projection {options.projection}"
    slugs = list(dict.fromkeys(tower.slug for tower in content.statistics.towers))
    one = slugs[0] if slugs else "NAME"
    stats, near = f"mmkd store stats {root}", f"mmkd store neighbors {root} KEY --teacher {one}"
    again = f"mmkd store report {root} report.html{chosen}{drawn}{projection} --json"
    return {
        "info": ("Coverage, failures, bytes, seconds, provenance", f"mmkd store info {root}"),
        "stats": ("All teachers, and how far they agree", f"{stats}{chosen}{drawn}"),
        **{
            f"stats-{slug}": (f"Norms, cosines and retrieval of {slug}", f"{stats} --teachers {slug}{drawn}")
            for slug in slugs
        },
        "failures": ("A shard and its failures", f"mmkd store show {root} shard:N"),
        "row": ("All about one row", f"mmkd store show {root}"),
        "near": ("Rows nearest to a row, words or a picture", near),
        "map": ("Rows and their places on the map", f"mmkd store atlas {root} --teacher {one} --out rows.parquet"),
        "report": ("Odd rows, and this page again", again),
        "verify": ("Every byte against the ledger", f"mmkd store verify {root}"),
    }


def _policy(scripts: list[str]) -> str:
    """Return the content security policy: only these scripts run, nothing is loaded, pictures are inline. Plotly writes
    its own style rules while it runs, hence 'unsafe-inline' for styles, which can run nothing."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
