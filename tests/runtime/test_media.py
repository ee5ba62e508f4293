from __future__ import annotations

import io
import zlib
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image, features

from mobilevd_deploy.errors import MediaError, UsageError
from mobilevd_deploy.runtime.media import contact_sheet, fit, read_picture, to_uint8, write_clip, write_frames

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
