"""One HTML page from the results of probes, noise robustness and heads: charts, tables, settings, notes.

`render_report` is a function of the results alone: the same results give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from whisper_at_cli import __version__
from whisper_at_cli.extract.evaluation.compare import Comparison
from whisper_at_cli.extract.html import document, escape, fill, template
from whisper_at_cli.probe.report import sections
from whisper_at_cli.probe.report.charts import fit_line
from whisper_at_cli.probe.report.results import (
    Probe,
    Source,
    clean_wer,
    head_name,
    head_value,
    model_name,
    name_probes,
    probes_in_noise,
    scored_in_noise,
)
from whisper_at_cli.probe.report.tables import shades

__all__ = ["Source", "render_report", "report_numbers"]
HERE = "whisper_at_cli.probe.report"


def render_report(
    probes: Sequence[Source], robustness: Sequence[Source] = (), heads: Sequence[Source] = (), *,
    compared: Comparison | None = None, title: str = "",
) -> str:  # fmt: skip
    """The page as text. Sections without results are left out."""
    named = name_probes(probes)
    content = [
        sections.glance(named, robustness, heads),
        sections.compared(compared) if compared else "",
        sections.layers(named),
        sections.noise(named, robustness),
        *(sections.classes(probe, robustness) for probe in named),
        *(sections.confusion(probe) for probe in named),
        sections.provenance(named, robustness, heads),
    ]
    title = title or "Probe report"
    body = fill(
        template(HERE, "report.html"),
        {
            "title": escape(title),
            "about": escape(_about(named, robustness, heads)),
            "notes": sections.notes(named, robustness, heads),
            "sections": "\n".join(filter(None, content)),
            "made": f"Made by whisper-at-cli {escape(__version__)}. This page is complete in itself and loads nothing.",
        },
    )
    style = template("whisper_at_cli.extract", "base.css") + fill(template(HERE, "report.css"), {"shades": shades()})
    script = template("whisper_at_cli.extract", "base.js") + template(HERE, "report.js")
    return document(title=title, body=body, style=style, script=script)


def _about(probes: Sequence[Probe], robustness: Sequence[Source], heads: Sequence[Source]) -> str:
    counts = (("probed cache", len(probes)), ("model in noise", len(robustness)), ("head", len(heads)))
    plural = {"probed cache": "probed caches", "model in noise": "models in noise", "head": "heads"}
    return " · ".join(f"{count} {what if count == 1 else plural[what]}" for what, count in counts if count)


def report_numbers(probes: Sequence[Source], robustness: Sequence[Source], heads: Sequence[Source]) -> dict:
    """What the page says first, ready for JSON."""
    named = name_probes(probes)
    correlations = []
    for probe, noisy in probes_in_noise(named, robustness):
        points = scored_in_noise(probe, noisy)
        fitted = fit_line(*zip(*points.values(), strict=True))
        r = fitted[2] if fitted else None
        correlations.append({"probe": probe.name, "model": model_name(noisy), "classes": len(points), "r": r})
    return {
        "probes": [
            {
                "name": probe.name, "source": probe.source.path, "metric": probe.metric, "layers": len(probe.layers),
                "best_layer": probe.best_layer, "value": (probe.best_row or {}).get(probe.metric),
            }
            for probe in named
        ],
        "robustness": [
            {"model": model_name(noisy), "source": noisy.path, "clean_wer": clean_wer(noisy),
             "snr": [level["snr"] for level in noisy.result["results"]]}
            for noisy in robustness
        ],
        "heads": [{"head": head_name(head), "source": head.path, **head_value(head.result)} for head in heads],
        "classes_and_noise": correlations,
    }  # fmt: skip
