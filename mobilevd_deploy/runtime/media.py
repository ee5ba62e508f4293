"""Pictures in, clips out.

In a program a picture is float32 (1, 3, H, W) and a clip float32 (T, 3, H, W), RGB in [-1, 1]. Outside it is
any image file or the first frame of a clip in, and GIF, MP4 or PNG out.

How a file becomes a picture, in this order; the Android app has to do the same (`ImagePrep.java`):

1. Decode. EXIF orientation turns the picture upright. Grey of more than 8 bits is reduced to 8 bits.
2. Convert the colours to sRGB if the file has an ICC profile: relative colorimetric, no black point
   compensation, 8 bits in and out, by LittleCMS. For a matrix profile (Display P3, Adobe RGB and what cameras
   and phones write) that is, per pixel,

       sRGB curve( clip( M_sRGB^-1  M_profile  profile curve(v / 255) ) ),  times 255, rounded,

   where M holds a profile's colorants (relative to D50) in its columns. LittleCMS is within 1 level of this
   formula (1 to 3 % of the values differ). A profile that moves no colour by more than 1 level is sRGB under
   another name, and is not applied. Transparency is kept. A profile that is broken, or that is for another
   kind of pixels, is ignored.
3. Lay the picture over white where it is transparent.
4. Scale it to cover the size, crop at the centre (`fit`): Pillow's Lanczos filter in 8 bits.
5. v becomes v / 127.5 - 1 (in float64, then rounded to float32).
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from mobilevd_deploy.base.files import written_aside
from mobilevd_deploy.errors import MediaError, UsageError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

CLIP_SUFFIXES = (".gif", ".mp4", ".png")
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
HEIF_SUFFIXES = {".heic", ".heics", ".heif", ".heifs", ".hif"}
INSTALL_HEIF = "install mobilevd-deploy[heif]"

# Pillow recognises these formats and decodes none of them by itself.
_UNREADABLE_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_ORIENTATION, _TURNED = 0x0112, range(2, 9)


@dataclass(frozen=True)
class Picture:
    """A picture as the model takes it.

    Attributes:
        pixels: float32 (1, 3, H, W) in [-1, 1].
        done: a sentence about what was done to the file.
        profile_ignored: the file has a colour profile that cannot be used, so its colours count as sRGB.
    """

    pixels: Floats
    done: str
    profile_ignored: bool = False


def read_picture(path: str | Path, width: int, height: int) -> Picture:
    """Read any image file, or the first frame of a clip, and fit it to width x height px.

    The module's docstring says how. HEIC needs the package pillow-heif. Raises MediaError for a missing,
    truncated or damaged file, one that is no image, or one of more than 179 million pixels.
    """
    path = Path(path)
    image, done, profile_ignored = _read_rgb(path)
    fitted, fitting = fit(image, width, height)
    pixels = (np.asarray(fitted, dtype=np.float64) / 127.5 - 1.0).astype(np.float32)
    what = f"{path.name}: {', '.join([*done, fitting])}"
    return Picture(pixels.transpose(2, 0, 1)[None].copy(), what, profile_ignored)


def picture_suffixes() -> frozenset[str]:
    """Return the endings, in lower case, of the files that `read_picture` opens here."""
    Image.init()
    _register_heif()
    endings = Image.registered_extensions().items()
    readable = {ending for ending, kind in endings if kind in Image.OPEN and kind not in _UNREADABLE_FORMATS}
    return frozenset(readable | VIDEO_SUFFIXES)


def fit(image: Image.Image, width: int, height: int) -> tuple[Image.Image, str]:
    """Scale to cover width x height, crop at the centre, and say so."""
    if image.size == (width, height):
        return image, f"{width}x{height} px as it is"
    scale = max(width / image.width, height / image.height)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    # Cropping and resizing in one step, so that a very long picture never becomes a huge one.
    box = (
        max(left, 0.0),
        max(top, 0.0),
        min(image.width - left, image.width),
        min(image.height - top, image.height),
    )
    fitted = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    lost = 1 - (width / scale) * (height / scale) / (image.width * image.height)
    side = "width" if left > top else "height"
    cut = f", the outer {lost:.0%} of its {side} cut off" if lost >= 0.005 else ""
    return fitted, f"{image.width}x{image.height} px scaled by {scale:.3g} to cover {width}x{height}{cut}"


def _read_rgb(path: Path) -> tuple[Image.Image, list[str], bool]:
    """Return a file's picture in sRGB, what was done to it, and whether its colour profile was ignored."""
    if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
        return _first_frame(path), ["first frame"], False
    _register_heif()
    try:
        with warnings.catch_warnings():
            # What matters ends in an error below; the warnings are about odd metadata, or about pictures of
            # more than half of Pillow's limit, where a phone's camera gets.
            warnings.simplefilter("ignore")
            with Image.open(path) as opened:
                # TIFF is turned while it is loaded, and then has no orientation any more.
                turned = opened.getexif().get(_ORIENTATION) in _TURNED
                opened.load()
                image, done, profile_ignored = _to_rgb(opened)
                return image, [*(["turned upright"] if turned else []), *done], profile_ignored
    except MediaError as error:
        raise MediaError(f"{path}: {error.what}") from error
    except FileNotFoundError:
        raise MediaError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise MediaError(f"{path} is a folder", next_step="name an image file") from None
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} is too large: {error}", next_step="scale it down first") from error
    except UnidentifiedImageError as error:
        raise _not_an_image(path) from error
    except Exception as error:  # decoders raise whatever comes: struct.error, SyntaxError, IndexError, ...
        raise MediaError(
            f"{path} is damaged or truncated: {error}", next_step="use an intact image"
        ) from error


def _not_an_image(path: Path) -> MediaError:
    with path.open("rb") as file:
        start = file.read(12)
    if not start:
        return MediaError(f"{path} is empty", next_step="use an intact image")
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        if not _register_heif():
            return MediaError(f"{path} is HEIC, which needs pillow-heif", next_step=INSTALL_HEIF)
        return MediaError(f"{path} is damaged or truncated HEIC", next_step="use an intact image")
    return MediaError(
        f"{path} is not an image that can be read",
        next_step="use PNG, JPEG, WebP, AVIF, HEIC, GIF, BMP or TIFF",
    )


def _register_heif() -> bool:
    """Let Pillow read HEIC if pillow-heif is installed, and return whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _first_frame(path: Path) -> Image.Image:
    """Return the first frame of a clip, upright, with pixels made square."""
    # A clip may store pixels that are wider or higher than square (sar): enlarge the shorter side.
    square = "scale=w='round(iw*max(1,sar))':h='round(ih*max(1,1/sar))',setsar=1"
    try:
        png = _ffmpeg(
            ["-i", f"file:{path}", "-frames:v", "1", "-vf", square],
            ["-pix_fmt", "rgb24", "-c:v", "png", "-f", "image2pipe", "pipe:1"],
        )
        with Image.open(io.BytesIO(png)) as frame:
            return frame.convert("RGB")
    except (OSError, RuntimeError) as error:  # Pillow's errors are OSErrors
        raise MediaError(
            f"{path} is not a clip that can be read: {error}",
            next_step=f"see what `ffmpeg -i {path.name} -frames:v 1 frame.png` says, or name that picture",
        ) from error


def _ffmpeg(source: Sequence[str], target: Sequence[str], given: memoryview | bytes = b"") -> bytes:
    """Run ffmpeg and return its standard output; `given` is its standard input.

    Raises OSError with the cause in one line, and with its errno where the disk is full; RuntimeError where
    there is no ffmpeg.
    """
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y", *source, *target]
    done = subprocess.run(command, input=given, capture_output=True, check=False)
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.decode(errors="replace")
    for number in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(number) in said:
            raise OSError(number, os.strerror(number))
    # The first line is the cause; the others say what failed in turn. Each begins with "[part @ address] ".
    lines = [re.sub(r"^(\[[^]]*\] *)+", "", line).strip() for line in said.splitlines()]
    raise OSError(next(filter(None, lines), f"ffmpeg ended with code {done.returncode}"))


def _to_rgb(opened: Image.Image) -> tuple[Image.Image, list[str], bool]:
    """Return a decoded picture in sRGB, what was done to it, and whether its colour profile was ignored."""
    done, profile_ignored = [], False
    if getattr(opened, "n_frames", 1) > 1:
        done.append(f"first of {opened.n_frames} frames")  # type: ignore[attr-defined]
    image = ImageOps.exif_transpose(opened)
    if image.mode == "F" or image.mode.startswith("I"):
        done.append("reduced to 8 bits")
        image = _reduce(image)
    is_grey, alpha, rgb = image.mode in ("1", "L", "LA"), None, None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if profile := opened.info.get("icc_profile"):
        try:
            rgb, name = _from_profile(image, profile, is_grey)
            done += [f"{name} converted to sRGB"] if name else []
        except Exception:  # a profile is whatever somebody wrote into the file
            profile_ignored = True
            done.append("its colour profile cannot be used, so its colours count as sRGB")
    if rgb is None and image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        rgb = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if rgb is None:
        rgb = image.convert("RGB")
    if alpha is not None:
        rgb.putalpha(alpha)
        if alpha.getextrema() != (255, 255):
            done.append("laid over white")
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return rgb, done, profile_ignored


def _from_profile(image: Image.Image, embedded: bytes, is_grey: bool) -> tuple[Image.Image | None, str]:
    """Return the picture in sRGB and the profile's name, or (None, "") if the profile is sRGB.

    The module's docstring says how. Raises any exception for a profile that is broken or does not fit.
    """
    profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
    is_cmyk = image.mode == "CMYK"
    fitting = {"RGB ": ("RGB", not is_cmyk), "GRAY": ("L", is_grey), "CMYK": ("CMYK", is_cmyk)}
    mode, fits = fitting[profile.profile.xcolor_space]
    if not fits:
        raise ValueError(f"a profile for {profile.profile.xcolor_space} does not fit {image.mode}")
    transform = ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        # LittleCMS replaces a curve by an optimised table, which is off by up to 10 levels for dark greys.
        ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE,
    )
    if not is_cmyk:
        colours = Image.fromarray(_colours(mode))
        moved = np.asarray(transform.apply(colours)).astype(int) - np.asarray(colours.convert("RGB"))
        if np.abs(moved).max() <= 1:
            return None, ""
    name = "".join(filter(str.isprintable, ImageCms.getProfileDescription(profile))).strip()
    return transform.apply(image.convert(mode)), name or "its colour profile"


def _colours(mode: str) -> Bytes:
    """Return colours from all over a mode: every grey (256, 1), or a grid of RGB (289, 17, 3)."""
    if mode == "L":
        return np.arange(256, dtype=np.uint8)[:, None]
    levels = np.linspace(0, 255, 17).astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 17, 3)


def _reduce(image: Image.Image) -> Image.Image:
    """Grey values of 16 bits, or floats of [0, 1] or [0, 255], as 8 bits."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise MediaError("it holds NaN or Inf")
    if image.mode == "F":
        scaled = values * 255 if values.max() <= 1 else values
    else:
        scaled = values / 257 if values.max() > 255 or image.mode != "I" else values
    return Image.fromarray(np.rint(np.clip(scaled, 0, 255)).astype(np.uint8))


def to_uint8(frames: npt.ArrayLike) -> Bytes:
    """Turn frames (T, 3, H, W) in [-1, 1] into uint8 (T, H, W, 3).

    In float64: clamp x to [-1, 1], then (x + 1) * 127.5 rounded to the nearest integer, halves to the even
    one. Raises MediaError for NaN or another shape.
    """
    values = np.asarray(frames, dtype=np.float64)
    if values.ndim != 4 or values.shape[1] != 3 or 0 in values.shape:
        raise MediaError(f"frames have shape {values.shape}, not (T, 3, H, W)")
    if np.isnan(values).any():
        raise MediaError("frames hold NaN", next_step="check the artifact with another seed or picture")
    return np.rint((np.clip(values, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def check_clip_path(path: Path) -> None:
    """Raise UsageError unless `write_clip` knows the suffix: worth asking before the work is done."""
    if path.suffix.lower() not in CLIP_SUFFIXES:
        raise UsageError(
            f"{path}: cannot write {path.suffix or 'a file without suffix'}",
            next_step=f"choose one of {', '.join(CLIP_SUFFIXES)}",
        )


def check_sheet_path(path: Path) -> None:
    """Raise UsageError unless `write_sheet` knows the suffix."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: a sheet is written as .png", next_step="choose that suffix")


def enlarge(frames: npt.ArrayLike, factor: int) -> Floats:
    """Scale frames (T, 3, H, W) up by a whole factor with a bicubic filter; factor 1 changes nothing."""
    values = np.asarray(frames, dtype=np.float32)
    if factor == 1:
        return values
    size = (values.shape[3] * factor, values.shape[2] * factor)
    planes = values.reshape(-1, *values.shape[2:])
    scaled = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in planes]
    return np.stack(scaled).reshape(*values.shape[:2], size[1], size[0])


def write_clip(frames: npt.ArrayLike, path: str | Path, fps: int) -> None:
    """Write frames (T, 3, H, W) in [-1, 1] as what the suffix says.

    .gif: loops for ever, one palette of 256 colours for all frames. .mp4: H.264, yuv420p, BT.709; an odd
    width or height gets its last column or row twice. .png: all frames side by side. Missing folders are
    made; the file appears under its name when it is complete. Raises UsageError for another suffix or a
    speed that the format cannot have, MediaError if it cannot be written.
    """
    path = Path(path)
    check_clip_path(path)
    writers: dict[str, Callable[[Bytes, Path, int], None]] = {
        ".gif": _write_gif,
        ".mp4": _write_mp4,
        ".png": lambda clip, aside, _: contact_sheet([("", clip)]).save(aside),
    }
    writer = writers[path.suffix.lower()]
    if fps < 1 or (path.suffix.lower() == ".gif" and fps > 50):
        raise UsageError(f"{path}: {fps} frames per second cannot be written; a GIF has 1 to 50")
    clip = to_uint8(frames)
    with _aside(path) as aside:
        writer(clip, aside, fps)


def write_frames(frames: npt.ArrayLike, folder: str | Path) -> list[Path]:
    """Write frames (T, 3, H, W) in [-1, 1] as frame_00.png, frame_01.png, ... into a new or empty `folder`.

    Returns their paths. Raises UsageError if there is something else in `folder`, MediaError if it cannot be
    written.
    """
    folder, clip = Path(folder), to_uint8(frames)
    check_frames_folder(folder)
    names = [f"frame_{i:0{max(2, len(str(len(clip) - 1)))}}.png" for i in range(len(clip))]
    with _aside(folder) as aside:
        aside.mkdir()
        for name, frame in zip(names, clip, strict=True):
            Image.fromarray(frame).save(aside / name)
    return [folder / name for name in names]


def check_frames_folder(folder: Path) -> None:
    """Raise UsageError unless `folder` is missing or empty: worth asking before the work is done."""
    try:
        occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise MediaError(f"{folder} cannot be written: {error}") from error
    if occupied:
        raise UsageError(
            f"{folder} exists and is not an empty folder", next_step="choose another, or empty it"
        )


def contact_sheet(rows: Sequence[tuple[str, Bytes]]) -> Image.Image:
    """Draw clips below each other, each frame side by side, with its label above unless that is empty.

    `rows`: (label, uint8 (T, H, W, 3)); lengths and sizes may differ. Raises UsageError without rows.
    """
    if not rows:
        raise UsageError("a contact sheet needs at least one row")
    gap = 2
    tallest = max(clip.shape[1] for _, clip in rows)
    font = ImageFont.load_default(size=min(max(tallest / 5, 10), 24))
    strip = int(font.size * 1.5)  # type: ignore[union-attr]
    labels = [strip if label else 0 for label, _ in rows]
    widths = [len(clip) * (clip.shape[2] + gap) - gap for _, clip in rows]
    # A label may be wider than a short row.
    widths += [int(font.getlength(label)) + 2 * gap for label, _ in rows]
    heights = [space + clip.shape[1] for space, (_, clip) in zip(labels, rows, strict=True)]
    sheet = Image.new("RGB", (max(widths), sum(heights) + gap * (len(rows) - 1)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for (label, clip), space, height in zip(rows, labels, heights, strict=True):
        draw.text((gap, top + space / 2), label, fill="black", font=font, anchor="lm")
        for i, frame in enumerate(clip):
            sheet.paste(Image.fromarray(frame), (i * (clip.shape[2] + gap), top + space))
        top += height + gap
    return sheet


def write_sheet(rows: Sequence[tuple[str, Bytes]], path: str | Path) -> None:
    """Write `contact_sheet(rows)` as PNG.

    Raises UsageError for another suffix, MediaError if it cannot be written.
    """
    check_sheet_path(Path(path))
    with _aside(Path(path)) as aside:
        contact_sheet(rows).save(aside)


def write_clip_sheet(picture: npt.ArrayLike, frames: npt.ArrayLike, title: str, path: str | Path) -> None:
    """Write a sheet with the input above the frames of its clip, which take two rows to fit a screen.

    `picture` is (1, 3, H, W) and `frames` (T, 3, H, W), both in [-1, 1]. Errors as in `to_uint8` and
    `write_sheet`.
    """
    clip = to_uint8(frames)
    half = (len(clip) + 1) // 2
    rows = [("input", to_uint8(picture)), (title, clip[:half]), ("", clip[half:])]
    write_sheet([row for row in rows if len(row[1])], path)


def _write_gif(clip: Bytes, path: Path, fps: int) -> None:
    # One palette for the whole clip: with one per frame, still parts would flicker.
    everything = Image.fromarray(clip.reshape(-1, *clip.shape[2:]))
    palette = everything.quantize(256, method=Image.Quantize.MEDIANCUT)
    frames = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for f in clip]
    # GIF counts hundredths of a second: round the times at which frames change, not their durations.
    times = [round(i * 100 / fps) * 10 for i in range(len(frames) + 1)]
    durations = [end - begin for begin, end in itertools.pairwise(times)]
    frames[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        optimize=False,
    )


def _write_mp4(clip: Bytes, path: Path, fps: int) -> None:
    height, width = clip.shape[1:3]
    clip = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    size = f"{clip.shape[2]}x{clip.shape[1]}"
    source = f"-f rawvideo -pix_fmt rgb24 -s {size} -r {fps} -i pipe:0".split()
    # BT.709 both for the conversion and in the file: players disagree about untagged small videos.
    convert = "-an -vf scale=out_color_matrix=bt709:out_range=tv -c:v libx264 -pix_fmt yuv420p"
    tag = "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv"
    target = f"{convert} {tag} -crf 16 -preset medium -movflags +faststart".split()
    _ffmpeg(source, [*target, f"file:{path}"], np.ascontiguousarray(clip).reshape(-1).data)
    packets = _ffmpeg(["-i", f"file:{path}"], ["-c", "copy", "-f", "framecrc", "pipe:1"]).splitlines()
    written = sum(not line.startswith(b"#") for line in packets)
    if written != len(clip):
        raise OSError(f"ffmpeg wrote {written} of {len(clip)} frames")


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Make missing folders and yield what `written_aside` does. Raises MediaError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            yield aside
    except (OSError, RuntimeError) as error:
        raise MediaError(f"{path} cannot be written: {error}", next_step="choose another place") from error
