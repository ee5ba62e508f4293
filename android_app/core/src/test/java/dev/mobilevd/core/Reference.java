package dev.mobilevd.core;

import static org.junit.Assert.assertTrue;
import static org.junit.Assume.assumeTrue;

import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.util.List;
import java.util.Map;

/** An exported artifact, and the clips that Python generated with it (tests.support.clip_reference). */
final class Reference {
    /** Minimum agreement in dB. Rounding differs between the runtimes. */
    static final double FLOOR_DB = 60;

    private final Path folder;
    final long seed;
    final List<String> pictures;

    private Reference(Path folder, Map<String, Object> index) throws MobileVdException {
        this.folder = folder;
        seed = Noise.parseSeed((String) index.get("seed"));
        pictures = Golden.list(index.get("pictures"));
    }

    /** The folder that a property names; without one the test is skipped. */
    static Path folder(String property) {
        String value = System.getProperty(property, "");
        assumeTrue(property + " names no folder", !value.isEmpty() && Files.isDirectory(Paths.get(value)));
        return Paths.get(value);
    }

    static Reference of(String property) throws Exception {
        Path folder = folder(property);
        return new Reference(folder, Json.readObject(Files.readAllBytes(folder.resolve("index.json"))));
    }

    float[] image(String picture, Manifest.PipelineSpec spec) throws Exception {
        return Golden.picture(folder.resolve(picture + ".png"), spec);
    }

    void assertSame(String picture, Clip clip) throws Exception {
        float[] expected = Golden.floats(Files.readAllBytes(folder.resolve(picture + ".f32")));
        double sqnr = Golden.sqnr(expected, clip.frames());
        System.out.printf("%s: %.1f dB against Python's clip%n", picture, sqnr);
        assertTrue(picture + ": " + sqnr + " dB", sqnr >= FLOOR_DB);
    }
}
