"""What infer.py leaves behind: images that carry their parameters, manifest.json, and compare.png.

Heavy libraries are imported where they are used: infer.py answers --help without them.
"""

import contextlib
import hashlib
import itertools
import json
from importlib.metadata import version
from pathlib import Path


def save_image(flags, column, index, prompt, seed, image):
    """Write one PNG with its parameters in it: "parameters" as A1111 writes them, "settings" as JSON -> its record."""
    from common import files

    names = ("steps", "guidance_scale", "guidance_rescale", "scheduler", "resolution", "image", "strength")
    settings = {name: getattr(flags, name) for name in names if flags.image or name not in ("image", "strength")}
    settings |= {"model": flags.pretrained_model_name_or_path, "adapters": column.sources}
    record = dict(column=column.title, prompt=prompt, negative_prompt=flags.negative_prompt, seed=seed, **settings)
    lines = [prompt] + ([f"Negative prompt: {flags.negative_prompt}"] if flags.negative_prompt else [])
    facts = [f"Steps: {flags.steps}, Sampler: {flags.scheduler}, CFG scale: {flags.guidance_scale}, Seed: {seed}"]
    facts += [f"Size: {image.width}x{image.height}, Model: {Path(flags.pretrained_model_name_or_path).name}"]
    facts += [f"Lora: {source['path']}:{source['scale']:g}" for source in column.sources]
    path = _unused(Path(flags.output_dir) / f"images/{column.stem}_{index:02d}_{seed}.png")
    parameters = "\n".join([*lines, ", ".join(facts)])
    files.save_png(path, image, {"parameters": parameters, "settings": json.dumps(record)})
    return {"file": f"images/{path.name}", "sha256": sha256(path), **record}


def _unused(path):
    """`path`, or where an earlier drawing has that name, the first of path_2, path_3, ... that is free."""
    numbered = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def write_results(flags, sampler, model, columns, records, load_s):
    """compare.png and manifest.json -> what the manifest says."""
    from common import files

    host = sampler.host
    output_dir = Path(flags.output_dir)
    drawn_s = sum(record["seconds"] for record in records)

    # What was loaded, on what, how long it took, and what came of it.
    manifest = {
        **provenance(flags, model),
        "device": {
            "type": host.device.type,
            "dtype": dtype_name(host),
            "memory": sampler.memory,
            "reason": host.reason,
        },
        # Loading, and what follows it.
        "timings": {
            "load_s": round(load_s, 2),
            "draw_s": round(drawn_s, 2),
            "s_per_image": round(drawn_s / len(records), 3),
        },
        "peak_gib": round(host.peak_gib(), 2),
        "columns": [{"title": column.title, "adapters": column.sources} for column in columns],
        "images": records,
    }

    # Earlier results get out of the way, then these take their places.
    if kept := keep_earlier(output_dir):
        host.say(f"earlier results are kept as {' and '.join(kept)}")
    if flags.compare:
        write_comparison(flags, host, manifest)
    files.write_json(output_dir / "manifest.json", manifest)
    made = "compare.png, " if flags.compare else ""
    host.say(
        f"{len(records)} images, {drawn_s / len(records):.2f} s each;"
        f" {made}manifest.json and images/ are in {output_dir}"
    )
    return manifest


def keep_earlier(output_dir):
    """compare.png and manifest.json are of the last call: those of the one before get a number, the same for both.

    Returns:
        the names that they have now.
    """
    from common import files

    grid = output_dir / "compare.png"
    manifest = output_dir / "manifest.json"
    if not (grid.exists() or manifest.exists()):
        return []
    number = next(n for n in itertools.count(1) if not any((output_dir / name).exists() for name in _numbered(n)))
    grid_kept, manifest_kept = (output_dir / name for name in _numbered(number))
    if grid.exists():
        grid.rename(grid_kept)
    if manifest.exists():
        manifest.rename(manifest_kept)
        with contextlib.suppress(ValueError, TypeError):  # not one of ours: it keeps what it says
            earlier = dict(json.loads(manifest_kept.read_text()))
            files.write_json(manifest_kept, earlier | ({"grid": grid_kept.name} if "grid" in earlier else {}))
    return [path.name for path in (grid_kept, manifest_kept) if path.exists()]


def _numbered(number):
    return f"compare_{number}.png", f"manifest_{number}.json"


def write_comparison(flags, host, manifest):
    """compare.png, and in the manifest how far each column is from the base.

    That is the mean absolute difference of pixels, 0 to 255.
    """
    from PIL import Image

    from common import files
    from common.render import grids

    output_dir = Path(flags.output_dir)
    titles = [column["title"] for column in manifest["columns"]]
    rows = {}  # (prompt, seed) -> one image per column
    for record in manifest["images"]:
        with Image.open(output_dir / record["file"]) as image:
            rows.setdefault((record["prompt"], record["seed"]), []).append(image.convert("RGB"))

    # Each column beside the base, which is the first.
    for i, column in enumerate(manifest["columns"]):
        column["mean_abs_difference_from_base"] = sum(difference(row[0], row[i]) for row in rows.values()) / len(rows)
        if i and not column["mean_abs_difference_from_base"]:
            host.say(f"{column['title']}: not one pixel differs from the base")

    # The sheet, and what no font of this machine can write on it.
    labels = [prompt if flags.num_images == 1 else f"{prompt} (seed {seed})" for prompt, seed in rows]
    model = Path(manifest["model"]["name"]).name
    footer = f"{model}, {flags.resolution} px, {flags.steps} steps of {flags.scheduler}"
    footer += f", guidance {flags.guidance_scale:g}, seed {flags.seed}"
    for text in [*titles, *labels]:
        if grids.legible(text)[1] != text:
            host.say(
                f"compare.png: no font here has all letters of {text!r}; install one, e.g. Noto Sans CJK;"
                " until then their codes stand there"
            )
    sheet = grids.grid(list(rows.values()), titles, labels, f"{footer}; the same noise in every column")
    manifest["grid"] = "compare.png"
    files.save_png(output_dir / "compare.png", sheet, {"parameters": footer})


def difference(image, other):
    """Mean absolute difference of two RGB images over all pixels and channels, 0 to 255."""
    from PIL import ImageChops, ImageStat

    return sum(ImageStat.Stat(ImageChops.difference(image, other)).mean) / 3


def provenance(flags, model):
    """What was loaded, by which packages: for manifest.json and merge.json."""
    packages = ("torch", "diffusers", "transformers", "peft")
    return {
        "model": {
            "name": model.name,
            "vae": str(model.vae),
            "revision": flags.revision,
            "variant": model.variant,
            "prediction_type": model.kind.prediction_type,
            "zero_terminal_snr": model.kind.zero_terminal_snr,
        },
        "versions": {package: version(package) for package in packages},
    }


def dtype_name(host):
    return str(host.dtype).removeprefix("torch.")


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
