from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, ImageCms, features

from mobilevd_deploy.errors import MediaError, ResourceError, UsageError
from mobilevd_deploy.runtime import media
from mobilevd_deploy.runtime.media import contact_sheet, fit, read_picture, to_uint8, write_clip, write_frames
from tests.support import icc

RED, GREEN = (200, 30, 20), (10, 180, 40)


def level(value):
    return np.float32(value / 127.5 - 1)


def halves(mode="RGB", size=(32, 16)):
    """Left half red, right half green."""
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (size[0] // 2, 0, *size))
    return image.convert(mode)


def save(image, path, **options):
    image.save(path, **options)
    return path


def clip(frames=5, height=32, width=48):
    """A bright square that moves over a smooth background."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    result = np.stack([np.stack([x, y, 1 - x]) * 1.2 - 0.7] * frames)
    for i in range(frames):
        result[i, :, 8:20, 4 + 5 * i : 16 + 5 * i] = np.array([0.9, 0.5, -0.9])[:, None, None]
    return result.astype(np.float32)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


# Pictures in


def test_pixels_and_layout(tmp_path):
    picture = read_picture(save(halves(), tmp_path / "a.png"), 32, 16)
    assert picture.pixels.shape == (1, 3, 16, 32)
    assert picture.pixels.dtype == np.float32
    assert picture.pixels.flags.c_contiguous
    assert picture.pixels[0, :, 0, 0].tolist() == [level(v) for v in RED]
    assert picture.pixels[0, :, 15, 31].tolist() == [level(v) for v in GREEN]
    assert picture.done == "a.png: 32x16 px as it is"


def test_all_8_bit_values_survive(tmp_path):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = save(Image.fromarray(np.stack([values] * 3, axis=-1)), tmp_path / "a.png")
    pixels = read_picture(path, 16, 16).pixels
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert np.array_equal(to_uint8(pixels)[0, :, :, 0], values)


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [("P", "png", 0), ("P", "gif", 0), ("RGBA", "png", 0), ("RGBA", "webp", 8), ("CMYK", "tiff", 1),
     ("CMYK", "jpg", 8), ("YCbCr", "jpg", 8), ("RGB", "bmp", 0), ("RGB", "jpg", 8), ("LAB", "tiff", 20)],
)  # fmt: skip
def test_colour_modes(tmp_path, mode, suffix, tolerance):
    if suffix == "webp" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    image = halves()
    if mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    else:
        image = image.quantize(16) if mode == "P" else image.convert(mode)
    path = save(image, tmp_path / f"a.{suffix}")
    pixels = to_uint8(read_picture(path, 32, 16).pixels)[0].astype(int)
    assert np.abs(pixels[8, 4] - RED).max() <= tolerance
    assert np.abs(pixels[8, 28] - GREEN).max() <= tolerance


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_modes(tmp_path, mode):
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (4, 0, 8, 8))
    pixels = read_picture(save(image.convert(mode), tmp_path / "a.png"), 8, 8).pixels
    assert (pixels[:, :, :, :4] == -1).all()
    assert (pixels[:, :, :, 4:] == 1).all()


def grey_steps(dtype, factor):
    return (np.arange(256).reshape(16, 16) * factor).astype(dtype)


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        (grey_steps(np.uint16, 257), "png"),
        (grey_steps(np.uint16, 257), "tiff"),
        (grey_steps(">u2", 257), "tiff"),
        (grey_steps(np.int32, 257), "tiff"),
        (grey_steps(np.int32, 1), "tiff"),
        (grey_steps(np.float32, 1 / 255), "tiff"),
        (grey_steps(np.float32, 1), "tiff"),
    ],
)
def test_deep_grey(tmp_path, values, suffix):
    picture = read_picture(save(Image.fromarray(values), tmp_path / f"a.{suffix}"), 16, 16)
    expected = np.arange(256).reshape(16, 16)
    assert np.array_equal(to_uint8(picture.pixels)[0, :, :, 1], expected)
    assert "reduced to 8 bits" in picture.done


def test_a_dark_16_bit_picture_stays_dark(tmp_path):
    path = save(Image.fromarray(np.full((8, 8), 200, np.uint16)), tmp_path / "a.png")
    assert read_picture(path, 8, 8).pixels.max() == level(1)


def test_transparent_is_white(tmp_path):
    image = halves("RGBA")
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    image.paste((0, 0, 0, 0), (0, 0, 4, 16))
    picture = read_picture(save(image, tmp_path / "a.png"), 32, 16)
    assert (picture.pixels[0, :, :, :4] == 1).all()
    assert "laid over white" in picture.done


def test_a_transparent_palette_colour_is_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (4, 0, 8, 8))
    picture = read_picture(save(image, tmp_path / "a.png", transparency=0), 8, 8)
    assert (picture.pixels[0, :, :, :4] == 1).all()
    assert picture.pixels[0, :, 0, 7].tolist() == [level(v) for v in RED]


def test_opaque_alpha_is_not_mentioned(tmp_path):
    assert "white" not in read_picture(save(halves("RGBA"), tmp_path / "a.png"), 32, 16).done


@pytest.mark.parametrize(("orientation", "first"), [(1, RED), (2, GREEN), (3, GREEN), (6, RED), (8, GREEN)])
def test_exif_orientation(tmp_path, orientation, first):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(halves(size=(32, 32)), tmp_path / "a.png", exif=exif)
    picture = read_picture(path, 32, 32)
    assert picture.pixels[0, :, 0, 0].tolist() == [level(v) for v in first]
    assert ("turned upright" in picture.done) == (orientation != 1)
    wide = read_picture(save(halves(), tmp_path / "b.png", exif=exif), 32, 16)
    assert ("16x32 px" in wide.done) == (orientation in (6, 8))


def test_an_animation_gives_its_first_frame(tmp_path):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), GREEN)
    path = save(first, tmp_path / "a.gif", save_all=True, append_images=[second])
    picture = read_picture(path, 8, 8)
    assert picture.pixels[0, :, 0, 0].tolist() == [level(v) for v in RED]
    assert "first of 2 frames" in picture.done


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", [0, *range(1, 9), 99])
def test_every_orientation_shows_the_same_scene(tmp_path, orientation, suffix):
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    scene = halves()
    scene.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    turned = scene if stored is None else scene.transpose(stored)
    picture = read_picture(save(turned, tmp_path / f"a.{suffix}", exif=exif, **options), 32, 16)
    assert np.abs(to_uint8(picture.pixels)[0].astype(int) - np.asarray(scene)).max() <= (
        30 if suffix == "jpg" else 0
    )
    assert ("turned upright" in picture.done) == (stored is not None)


# Colour profiles

GAMMA = 2.19921875


def adobe_curve(v):
    return v**GAMMA


PROFILES = {
    "Display P3": (icc.DISPLAY_P3, icc.srgb_to_linear),
    "Adobe RGB": (icc.ADOBE_RGB, adobe_curve),
}


def all_colours():
    """Colours from all over RGB, as a picture of 64x64 px."""
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("suffix", "mode"), [("png", "RGB"), ("tif", "RGB"), ("webp", "RGB"), ("png", "RGBA")]
)
def test_wide_gamut_colours_become_srgb(tmp_path, suffix, mode, profile):
    colours = all_colours()
    image = Image.fromarray(colours).convert(mode)
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(
        image,
        tmp_path / f"a.{suffix}",
        icc_profile=icc.matrix_profile(profile, *PROFILES[profile]),
        **options,
    )
    picture = read_picture(path, 64, 64)
    expected = icc.in_srgb(colours, *PROFILES[profile]).astype(int)
    assert np.abs(expected - colours).max() > 30, "the profile has to matter"
    assert np.abs(to_uint8(picture.pixels)[0] - expected).max() <= 1
    assert f"{profile} converted to sRGB" in picture.done
    assert not picture.profile_ignored


def test_a_palette_and_a_transparent_picture_are_converted_too(tmp_path):
    profile = icc.matrix_profile("Display P3", *PROFILES["Display P3"])
    red, green = (icc.in_srgb(np.array(colour), *PROFILES["Display P3"]) for colour in (RED, GREEN))
    for mode in ("P", "RGBA"):
        image = halves().quantize(16) if mode == "P" else halves("RGBA")
        if mode == "RGBA":
            image.paste((0, 0, 0, 0), (0, 0, 4, 16))
        pixels = to_uint8(read_picture(save(image, tmp_path / "a.png", icc_profile=profile), 32, 16).pixels)[
            0
        ]
        assert np.abs(pixels[8, 8].astype(int) - red).max() <= 1
        assert np.abs(pixels[8, 28].astype(int) - green).max() <= 1
        assert mode == "P" or (pixels[:, :4] == 255).all()


@pytest.mark.parametrize(("mode", "dtype"), [("L", np.uint8), ("LA", np.uint8), ("I;16", np.uint16)])
def test_grey_profiles(tmp_path, mode, dtype):
    ramp = np.arange(256).reshape(16, 16)
    image = Image.fromarray((ramp * (257 if dtype == np.uint16 else 1)).astype(dtype))
    image = image.convert("LA") if mode == "LA" else image
    path = save(image, tmp_path / "a.png", icc_profile=icc.grey_profile("Linear grey", lambda v: v))
    picture = read_picture(path, 16, 16)
    expected = np.rint(255 * icc.linear_to_srgb(ramp / 255))
    for channel in range(3):
        assert np.abs(to_uint8(picture.pixels)[0, :, :, channel] - expected).max() <= 1
    assert "Linear grey converted to sRGB" in picture.done


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_a_cmyk_profile_is_used(tmp_path, suffix):
    profile = icc.constant_cmyk_profile("Grey ink", (53.585, 0, 0))  # sRGB 128
    path = save(halves("CMYK"), tmp_path / f"a.{suffix}", icc_profile=profile)
    picture = read_picture(path, 32, 16)
    assert np.abs(to_uint8(picture.pixels)[0].astype(int) - 128).max() <= 1
    assert "Grey ink converted to sRGB" in picture.done


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        icc.matrix_profile("sRGB by another name", icc.SRGB, icc.srgb_to_linear),
    ],
    ids=["LittleCMS", "IEC"],
)
def test_an_srgb_profile_changes_nothing(tmp_path, profile):
    path = save(Image.fromarray(all_colours()), tmp_path / "a.png", icc_profile=profile)
    picture = read_picture(path, 64, 64)
    assert np.array_equal(to_uint8(picture.pixels)[0], all_colours())
    assert picture.done == "a.png: 64x64 px as it is"


P3 = icc.matrix_profile("Display P3", *PROFILES["Display P3"])


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("RGB", b"not a profile at all"),
        ("RGB", P3[:200]),
        ("RGB", P3[:16] + b"LUV " + P3[20:]),
        ("RGB", icc.grey_profile("grey", lambda v: v)),
        ("RGB", icc.constant_cmyk_profile("inks", (50, 0, 0))),
        ("CMYK", P3),
    ],
    ids=["text", "cut off", "another space", "for grey", "for CMYK", "RGB on CMYK"],
)
def test_a_profile_that_cannot_be_used_is_ignored_with_a_notice(tmp_path, mode, profile):
    path = save(halves(mode), tmp_path / "a.tif", icc_profile=profile)
    picture = read_picture(path, 32, 16)
    assert np.abs(to_uint8(picture.pixels)[0].astype(int) - np.asarray(halves())).max() <= 1
    assert picture.profile_ignored
    assert "its colour profile cannot be used, so its colours count as sRGB" in picture.done


# Forms that people bring


def png_of_16_bits(values):
    """Write uint16 (H, W, 3 or 4) as PNG, which Pillow cannot."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    height, width, channels = values.shape
    header = (
        width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2 if channels == 3 else 6, 0, 0, 0])
    )
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def as_bytes(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = as_bytes(halves(), "JPEG", quality=95, subsampling=0)
OTHER = halves().rotate(180)
DEEP = np.asarray(halves()).astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("name", "content", "tolerance"),
    [
        ("UPPER.JPG", JPEG, 8),
        ("photo.jfif", JPEG, 8),
        ("no_ending", JPEG, 8),
        ("jpeg_called.png", JPEG, 8),
        ("trailing.jpg", JPEG + b"\0" * 5000, 8),
        ("rgb16.png", png_of_16_bits(DEEP), 0),
        ("rgba16.png", png_of_16_bits(np.pad(DEEP, ((0, 0), (0, 0), (0, 1)), constant_values=65535)), 0),
        ("pages.tif", as_bytes(halves(), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]), 0),
        ("anim.webp", as_bytes(halves(), "WEBP", save_all=True, append_images=[OTHER], lossless=True), 0),
        ("anim.png", as_bytes(halves(), "PNG", save_all=True, append_images=[OTHER]), 0),
        ("cmyk.jpg", as_bytes(halves("CMYK"), "JPEG", quality=95), 8),
        ("opaque_colour_elsewhere.png", as_bytes(halves(), "PNG", transparency=(1, 2, 3)), 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_forms_that_cameras_and_tools_leave(tmp_path, name, content, tolerance):
    (tmp_path / name).write_bytes(content)
    pixels = to_uint8(read_picture(tmp_path / name, 32, 16).pixels)[0].astype(int)
    # JPEG blurs the edge between the halves.
    assert np.abs(pixels[:, 2:12] - RED).max() <= tolerance
    assert np.abs(pixels[:, 20:30] - GREEN).max() <= tolerance


def test_a_transparent_colour_of_an_rgb_picture_is_white(tmp_path):
    picture = read_picture(save(halves(), tmp_path / "a.png", transparency=RED), 32, 16)
    assert (picture.pixels[0, :, :, :16] == 1).all()
    assert picture.pixels[0, :, 0, 20].tolist() == [level(v) for v in GREEN]


def test_avif(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = save(halves(), tmp_path / "a.avif", quality=95, subsampling="4:4:4")
    assert np.abs(to_uint8(read_picture(path, 32, 16).pixels)[0, 8, 4].astype(int) - RED).max() <= 8


HEIC_START = (24).to_bytes(4, "big") + b"ftypheic\0\0\0\0mif1heic" + b"\0" * 2000


def test_heic_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("a.heic", "a.jpg"):
        (tmp_path / name).write_bytes(HEIC_START)
        with pytest.raises(MediaError, match=f"{name} is HEIC, which needs pillow-heif") as caught:
            read_picture(tmp_path / name, 8, 8)
        assert caught.value.next_step == "install mobilevd-deploy[heif]"


def test_heic_with_its_package(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    save(halves(), tmp_path / "a.heic", quality=95, icc_profile=P3)
    picture = read_picture(tmp_path / "a.heic", 32, 16)
    expected = icc.in_srgb(np.array(RED), *PROFILES["Display P3"]).astype(int)
    assert np.abs(to_uint8(picture.pixels)[0, 8, 4] - expected).max() <= 8
    assert "Display P3 converted to sRGB" in picture.done
    (tmp_path / "b.heic").write_bytes(HEIC_START)
    with pytest.raises(MediaError, match=r"b\.heic is damaged or truncated"):
        read_picture(tmp_path / "b.heic", 8, 8)


# First frames of clips


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("ratio", "stored", "shown"),
    [
        ("1/1", "64x32", (64, 32)),
        ("2/1", "32x32", (64, 32)),
        ("1/2", "64x16", (64, 32)),
        ("16/15", "60x32", (64, 32)),
    ],
)
def test_pixels_that_are_not_square_are_shown_right(tmp_path, ratio, stored, shown):
    """A red disc in the middle is as wide as it is high, however its pixels are stored."""
    picture = Image.new("RGB", (256, 128), "white")
    picture.paste(
        RED, (64, 0), Image.radial_gradient("L").resize((128, 128)).point(lambda v: 255 * (v < 100))
    )
    save(picture, tmp_path / "a.png")
    size = stored.replace("x", ":")
    ffmpeg("-i", tmp_path / "a.png", "-vf", f"scale={size},setsar={ratio}", "-crf", "1", tmp_path / "a.mp4")
    read = read_picture(tmp_path / "a.mp4", *shown)
    assert read.done == "a.mp4: first frame, 64x32 px as it is"
    upright = to_uint8(read_picture(tmp_path / "a.png", *shown).pixels)[0]
    assert psnr(to_uint8(read.pixels)[0], upright) > 22
    red = to_uint8(read.pixels)[0, :, :, 1] < 140
    assert abs(int(red.any(axis=0).sum()) - int(red.any(axis=1).sum())) <= 2


def test_a_turned_clip_with_wide_pixels(tmp_path):
    save(halves(size=(32, 32)), tmp_path / "a.png")
    ffmpeg("-i", tmp_path / "a.png", "-vf", "setsar=2/1", "-crf", "1", tmp_path / "wide.mp4")
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "wide.mp4", "-c", "copy", tmp_path / "turned.mp4")
    assert "32x64 px as it is" in read_picture(tmp_path / "turned.mp4", 32, 64).done


def test_names_of_clips_are_never_options_or_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-y.mp4", "http:x.mp4", "a b ü.mp4"):
        write_clip(clip(2), Path(name), 7)
        assert read_picture(name, 48, 32).done.endswith("first frame, 48x32 px as it is")


def test_clips_are_read_and_written_in_silence(tmp_path, caplog, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_clip(clip(60, 33, 47), tmp_path / "a.mp4", 10)
        read_picture(tmp_path / "a.mp4", 48, 32)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"not a clip"])
def test_a_broken_clip_gives_one_line(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(MediaError) as caught:
        read_picture(tmp_path / "a.mp4", 8, 8)
    assert "\n" not in caught.value.what
    assert "Invalid data found" in caught.value.what or "moov atom not found" in caught.value.what


# Fitting


def test_wide_pictures_lose_their_sides():
    image = Image.new("RGB", (400, 100), "black")
    image.paste("white", (150, 0, 250, 100))
    fitted, done = fit(image, 50, 50)
    assert fitted.size == (50, 50)
    assert np.asarray(fitted).min() > 235  # the filter reads a little beyond the cut
    assert done == "400x100 px scaled by 0.5 to cover 50x50, the outer 75% of its width cut off"


def test_tall_pictures_lose_top_and_bottom():
    image = Image.new("RGB", (30, 90), "black")
    image.paste("white", (0, 30, 30, 60))
    fitted, done = fit(image, 60, 60)
    assert np.asarray(fitted)[5:-5].min() > 250
    assert done == "30x90 px scaled by 2 to cover 60x60, the outer 67% of its height cut off"


def test_the_same_aspect_ratio_loses_nothing():
    fitted, done = fit(halves(size=(64, 32)), 32, 16)
    assert done == "64x32 px scaled by 0.5 to cover 32x16"
    assert psnr(np.asarray(fitted), np.asarray(halves())) > 25


def test_the_centre_stays_the_centre():
    """A symmetric picture stays symmetric for every combination of odd and even sizes."""
    for size in ((33, 20), (40, 21), (51, 51), (7, 100)):
        ramp = (
            np.abs(np.arange(size[0]) - (size[0] - 1) / 2)[None]
            + np.abs(np.arange(size[1]) - (size[1] - 1) / 2)[:, None]
        )
        image = Image.fromarray((ramp * 2).astype(np.uint8)).convert("RGB")
        for target in ((16, 16), (24, 8), (25, 9)):
            pixels = np.asarray(fit(image, *target)[0]).astype(int)
            assert np.abs(pixels - pixels[::-1, ::-1]).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (2, 3)])
def test_extreme_sizes(tmp_path, size):
    path = save(Image.new("RGB", size, RED), tmp_path / "a.png")
    pixels = read_picture(path, 64, 32).pixels
    assert pixels.shape == (1, 3, 32, 64)
    assert pixels[0, :, 16, 32].tolist() == [level(v) for v in RED]


# What is no picture


def test_missing_and_folder(tmp_path):
    with pytest.raises(MediaError, match="does not exist"):
        read_picture(tmp_path / "absent.png", 8, 8)
    with pytest.raises(MediaError, match="is a folder"):
        read_picture(tmp_path, 8, 8)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"BM" + b"\0" * 60]
)
def test_not_an_image(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(MediaError, match=r"a\.png"):
        read_picture(tmp_path / "a.png", 8, 8)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(MediaError, match=r"a\.jpg is empty"):
        read_picture(tmp_path / "a.jpg", 8, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_truncated_at_any_place(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = save(Image.fromarray(noise), tmp_path / f"a.{suffix}").read_bytes()
    for share in (0.01, 0.1, 0.5, 0.9):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(MediaError, match="cut"):
            read_picture(path, 8, 8)


def test_flipped_bytes_never_give_a_traceback(tmp_path):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "gif", "tiff"):
        content = save(Image.fromarray(noise), tmp_path / f"a.{suffix}").read_bytes()
        for _ in range(100):
            damaged = bytearray(content)
            for place in generator.integers(0, len(content), 4):
                damaged[place] = generator.integers(256)
            (tmp_path / f"b.{suffix}").write_bytes(damaged)
            try:
                pixels = read_picture(tmp_path / f"b.{suffix}", 8, 8).pixels
            except MediaError:
                continue
            assert pixels.shape == (1, 3, 8, 8)


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (50_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    with pytest.raises(MediaError, match="too large"):
        read_picture(path, 8, 8)


def test_floats_that_are_no_picture(tmp_path):
    path = save(Image.fromarray(np.full((4, 4), np.nan, np.float32)), tmp_path / "a.tiff")
    with pytest.raises(MediaError, match=r"a\.tiff: it holds NaN or Inf"):
        read_picture(path, 8, 8)


# Clips out


def test_rounding_is_half_to_even():
    x = np.array([-1, 1, -2, 2, 0, 1 / 255, -1 / 255, 0.5, np.inf, -np.inf])
    expected = [0, 255, 0, 255, 128, 128, 127, 191, 255, 0]  # 127.5 -> 128, 128.0, 127.0, 191.25
    frames = np.broadcast_to(x, (1, 3, 1, 10))
    assert to_uint8(frames)[0, 0, :, 0].tolist() == expected


def test_frames_that_are_none():
    for shape in ((3, 8, 8), (1, 8, 8, 3), (0, 3, 8, 8), (2, 3, 0, 8)):
        with pytest.raises(MediaError, match="not \\(T, 3, H, W\\)"):
            to_uint8(np.zeros(shape))
    bad = clip()
    bad[2, 1, 3, 4] = np.nan
    with pytest.raises(MediaError, match="NaN"):
        to_uint8(bad)


def test_gif(tmp_path):
    frames = clip()
    write_clip(frames, tmp_path / "deep" / "a.gif", 7)
    with Image.open(tmp_path / "deep" / "a.gif") as gif:
        assert gif.n_frames == 5
        assert gif.size == (48, 32)
        assert gif.info["loop"] == 0
        durations = []
        for i, frame in enumerate(to_uint8(frames)):
            gif.seek(i)
            durations.append(gif.info["duration"])
            assert psnr(np.asarray(gif.convert("RGB")), frame) > 28
    assert sum(durations) == 710  # 5/7 s to the nearest hundredth
    assert max(durations) - min(durations) <= 10
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.gif"]


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (1, 1)])
def test_mp4(tmp_path, size):
    frames = clip(6, *size)
    write_clip(frames, tmp_path / "a.MP4", 10)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.MP4"))
    meta = next(reader)
    width, height = meta["size"]
    assert (height, width) == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")
    assert meta["fps"] == 10
    decoded = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    assert len(decoded) == 6
    if size == (32, 48):
        for a, b in zip(decoded, to_uint8(frames), strict=True):
            assert psnr(a, b) > 24
            assert abs(a.mean(axis=(0, 1)) - b.mean(axis=(0, 1))).max() < 3  # colours as they were


def test_png_holds_all_frames(tmp_path):
    frames = clip()
    write_clip(frames, tmp_path / "a.png", 7)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (32, 5 * 50 - 2, 3)
    for i, frame in enumerate(to_uint8(frames)):
        assert np.array_equal(sheet[:, i * 50 : i * 50 + 48], frame)


def test_single_frame_clips(tmp_path):
    for name in ("a.gif", "a.mp4", "a.png"):
        write_clip(clip(1), tmp_path / name, 7)
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("name", ["a.webm", "a", "gif", "a.gif.txt"])
def test_unknown_suffixes(tmp_path, name):
    with pytest.raises(UsageError, match="cannot write"):
        write_clip(clip(), tmp_path / name, 7)
    assert not list(tmp_path.iterdir())


def test_impossible_speeds(tmp_path):
    for name, fps in (("a.gif", 0), ("a.gif", 51), ("a.mp4", 0), ("a.mp4", -7)):
        with pytest.raises(UsageError, match="frames per second"):
            write_clip(clip(), tmp_path / name, fps)
    write_clip(clip(), tmp_path / "a.gif", 50)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "taken.gif").mkdir()
    for path in (tmp_path / "file" / "a.gif", tmp_path / "taken.gif", Path("/proc/nothing/a.gif")):
        with pytest.raises(MediaError, match="cannot be written"):
            write_clip(clip(), path, 7)
    assert (tmp_path / "taken.gif").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.gif"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("suffix", media.CLIP_SUFFIXES)
def test_a_full_disk_is_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("old")
    # Every write to /dev/full fails as on a full disk. This is the name that the clip is written under first.
    (tmp_path / f".{os.getpid()}.new.a{suffix}").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match="the disk is full") as caught:
        write_clip(clip(), path, 7)
    assert "\n" not in caught.value.what
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert path.read_text() == "old"


def test_an_existing_clip_is_replaced_and_kept_when_writing_fails(tmp_path):
    path = tmp_path / "a.gif"
    path.write_text("old")
    broken = clip()
    broken[0] = np.nan
    with pytest.raises(MediaError):
        write_clip(broken, path, 7)
    assert path.read_text() == "old"
    write_clip(clip(), path, 7)
    assert path.read_bytes()[:4] == b"GIF8"


def test_frames_folder(tmp_path):
    frames = clip(12)
    paths = write_frames(frames, tmp_path / "frames")
    assert [p.name for p in paths[:2] + paths[-1:]] == ["frame_00.png", "frame_01.png", "frame_11.png"]
    for path, frame in zip(paths, to_uint8(frames), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), frame)
    (tmp_path / "empty").mkdir()
    write_frames(frames, tmp_path / "empty")
    assert len(list((tmp_path / "empty").iterdir())) == 12
    with pytest.raises(UsageError, match="not an empty folder"):
        write_frames(frames, tmp_path / "frames")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="not an empty folder"):
        write_frames(frames, tmp_path / "file")
    with pytest.raises(MediaError, match="cannot be written"):
        write_frames(frames, tmp_path / "file" / "frames")


# Contact sheets


def test_contact_sheet():
    a, b = to_uint8(clip(3)), to_uint8(-clip(2, 16, 20))
    sheet = contact_sheet([("generated", a), ("", b)])
    pixels = np.asarray(sheet)
    assert sheet.mode == "RGB"
    assert pixels.shape[1] == 3 * 50 - 2
    top = pixels.shape[0] - 32 - 2 - 16
    assert top >= 10
    assert np.array_equal(pixels[top : top + 32, 50:98], a[1])
    assert np.array_equal(pixels[-16:, 22:42], b[1])
    assert pixels[:top].min() < 100  # something is written there
    assert (pixels[-16:, 42:] == 255).all()


def test_contact_sheet_makes_room_for_its_labels():
    tiny = to_uint8(clip(1, 8, 8))
    narrow, wide = contact_sheet([("a", tiny)]), contact_sheet([("a rather long label", tiny)])
    assert wide.width > narrow.width
    blank = np.asarray(wide)[:, -2:]
    assert (blank == 255).all()
    with pytest.raises(UsageError):
        contact_sheet([])


def test_pictures_come_from_any_path_like(tmp_path):
    buffer = io.BytesIO()
    halves().save(buffer, "PNG")
    path = tmp_path / "name with spaces ü"
    path.write_bytes(buffer.getvalue())
    assert "name with spaces ü" in read_picture(str(path), 8, 8).done
