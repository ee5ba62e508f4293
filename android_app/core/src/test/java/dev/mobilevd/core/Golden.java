package dev.mobilevd.core;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertTrue;
import static org.junit.Assert.fail;

import java.awt.image.BufferedImage;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.util.Base64;
import java.util.List;
import java.util.Map;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import javax.imageio.ImageIO;

/** The golden files of tests/vectors, and shared helpers. */
final class Golden {
    static final Path ROOT = Paths.get(System.getProperty("mobilevd.root"));
    static final Path VECTORS = ROOT.resolve("tests").resolve("vectors");
    static final Path ARTIFACT = VECTORS.resolve("artifact");
    static final Cancellation NEVER = new Cancellation();
    static final MemoryInfo PLENTY = () -> new MemoryInfo.Snapshot(1L << 40, 1L << 41);

    private Golden() {}

    /** An action that must fail. */
    interface Attempt {
        void run() throws Exception;
    }

    /** Run it; assert that it fails with this problem, and return the exception. */
    static MobileVdException assertFails(Problem problem, Attempt attempt) {
        try {
            attempt.run();
        } catch (MobileVdException error) {
            assertEquals(error.getMessage(), problem, error.problem());
            assertTrue(error.getMessage(), error.getMessage().length() > 5);
            return error;
        } catch (Exception error) {
            throw new AssertionError("expected " + problem, error);
        }
        fail("nothing failed; expected " + problem);
        return null;
    }

    static Map<String, Object> json(String name) throws Exception {
        return Json.readObject(Files.readAllBytes(VECTORS.resolve(name)));
    }

    /** A list of objects of a JSON value. */
    @SuppressWarnings("unchecked")
    static List<Map<String, Object>> objects(Object value) {
        return (List<Map<String, Object>>) value;
    }

    @SuppressWarnings("unchecked")
    static <T> List<T> list(Object value) {
        return (List<T>) value;
    }

    static int[] ints(Object value) {
        return Golden.<Long>list(value).stream().mapToInt(Math::toIntExact).toArray();
    }

    static byte[] hex(Object text) {
        String digits = (String) text;
        byte[] bytes = new byte[digits.length() / 2];
        for (int i = 0; i < bytes.length; i++) {
            bytes[i] = (byte) Integer.parseInt(digits.substring(2 * i, 2 * i + 2), 16);
        }
        return bytes;
    }

    static float[] floats(byte[] littleEndian) {
        FloatBuffer buffer = ByteBuffer.wrap(littleEndian).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer();
        float[] values = new float[buffer.remaining()];
        buffer.get(values);
        return values;
    }

    /** Copy the tiny artifact. */
    static Path copy(Path to) throws IOException {
        for (Path file : files(ARTIFACT)) {
            Path target = to.resolve(ARTIFACT.relativize(file).toString());
            Files.createDirectories(target.getParent());
            Files.copy(file, target);
        }
        return to;
    }

    /** All files below a folder, sorted. */
    static List<Path> files(Path root) throws IOException {
        try (Stream<Path> paths = Files.walk(root)) {
            return paths.filter(path -> !Files.isDirectory(path)).sorted().collect(Collectors.toList());
        }
    }

    /** Change the manifest and update its digest. */
    static void rewriteManifest(Path root, String from, String to) throws IOException {
        String text = read(root.resolve(Manifest.FILE));
        assertTrue(from, text.contains(from));
        byte[] changed = text.replace(from, to).getBytes(StandardCharsets.UTF_8);
        Files.write(root.resolve(Manifest.FILE), changed);
        String line = Sha256.of(changed) + "  " + Manifest.FILE + "\n";
        Files.write(root.resolve(Manifest.DIGEST_FILE), line.getBytes(StandardCharsets.UTF_8));
    }

    static String read(Path file) throws IOException {
        return new String(Files.readAllBytes(file), StandardCharsets.UTF_8);
    }

    /** The first picture of pictures.json, as input of the tiny artifact. */
    static float[] picture() throws Exception {
        Map<String, Object> picture = objects(json("pictures.json").get("pictures")).get(0);
        int[] size = ints(picture.get("size"));
        return ImagePrep.prepare(argb(picture.get("argb")), size[0], size[1], 24, 16);
    }

    static int[] argb(Object hex) {
        ByteBuffer bytes = ByteBuffer.wrap(hex(hex));
        int[] pixels = new int[bytes.remaining() / 4];
        for (int i = 0; i < pixels.length; i++) {
            pixels[i] = bytes.getInt(4 * i);
        }
        return pixels;
    }

    /** Python's clip of that picture. */
    static float[] clip() throws Exception {
        return floats(Base64.getDecoder().decode((String) json("clip.json").get("frames_float32_base64")));
    }

    static long clipSeed() throws Exception {
        return Noise.parseSeed((String) json("clip.json").get("seed"));
    }

    /** Signal-to-error ratio in dB; infinite if equal. */
    static double sqnr(float[] reference, float[] test) {
        assertEquals(reference.length, test.length);
        double signal = 0;
        double error = 0;
        for (int i = 0; i < reference.length; i++) {
            signal += (double) reference[i] * reference[i];
            error += Math.pow((double) reference[i] - test[i], 2);
        }
        return error == 0 ? Double.POSITIVE_INFINITY : 10 * Math.log10(signal / error);
    }

    /** A picture file, decoded to ARGB, not premultiplied. */
    static float[] picture(Path file, Manifest.PipelineSpec spec) throws Exception {
        BufferedImage image = ImageIO.read(file.toFile());
        int width = image.getWidth();
        int height = image.getHeight();
        int[] pixels = image.getRGB(0, 0, width, height, null, 0, width);
        return ImagePrep.prepare(pixels, width, height, spec.width(), spec.height());
    }
}
