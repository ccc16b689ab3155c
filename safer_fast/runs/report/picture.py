"""Picture of a run: the map of its layers above images before and after the attack."""

from __future__ import annotations

import io
from pathlib import Path

from safer_fast.runs.figures.canvas import as_png
from safer_fast.runs.figures.layer_map import draw_layer_map, score_limits
from safer_fast.runs.layout import RunFolder
from safer_fast.runs.report.reading import read_runs
from safer_fast.runtime.files import write_whole

_MARGIN, _GAP = 24, 18  # pixels


def write_picture(run: Path, output: Path) -> Path:
    """Write a PNG of a run: its last selection's layer map, and its gallery; return the file.

    The gallery shows images, what the attack adds, enlarged, and both together. Raises ValueError
    for a folder that is no run, for a run without scores of layers, and for one without gallery.
    """
    from PIL import Image

    from safer_fast.runs.gallery import gallery_strip, png_of, read_gallery

    (read,) = read_runs([run])
    scored = [event for event in read.selections if event.get("scores")]
    if not scored:
        raise ValueError(f"--picture: expected a run that has scored its layers, got {run}")
    if not RunFolder(run).gallery.is_file():
        raise ValueError(f"--picture: expected a run with a gallery, got {run}")
    last = scored[-1]
    limits = score_limits([last["scores"]])
    title = f"{last.get('criterion', 'score')} of each layer, by depth; dots: the layers trained"
    drawing = draw_layer_map(last["scores"], last.get("selected", []), limits=limits, title=title)
    gallery, _ = read_gallery(RunFolder(run).gallery)
    above, below = (
        Image.open(io.BytesIO(png)).convert("RGB")
        for png in (as_png(drawing)[0], gallery_strip(gallery)[0])
    )
    below = below.resize((above.width, round(below.height * above.width / below.width)))
    page = Image.new(
        "RGB",
        (above.width + 2 * _MARGIN, above.height + below.height + _GAP + 2 * _MARGIN),
        "white",
    )
    page.paste(above, (_MARGIN, _MARGIN))
    page.paste(below, (_MARGIN, _MARGIN + above.height + _GAP))
    write_whole(output, png_of(page))
    return output
