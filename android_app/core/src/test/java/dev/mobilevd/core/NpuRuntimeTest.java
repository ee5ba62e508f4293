package dev.mobilevd.core;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertNull;
import static org.junit.Assert.assertTrue;

import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

/** Tests that need no library of Qualcomm's. The others are in {@link NpuSimulatorTest}. */
public class NpuRuntimeTest {
    @Rule public final TemporaryFolder temporary = new TemporaryFolder();

    @Test
    public void aChipIsItsPartNumberAndItsVariants() {
        assertTrue(NpuRuntime.isChip("SM8650", "SM8650"));
        assertTrue(NpuRuntime.isChip("sm8750-AC ", "SM8750"));
        assertTrue(NpuRuntime.isChip("SM8650P", "SM8650"));
        assertTrue(NpuRuntime.isChip("SM8750P", "SM8750"));
        assertTrue(NpuRuntime.isChip("sm8550p", "SM8550"));
        assertFalse(NpuRuntime.isChip("SM8650P", "SM8550"));
        assertFalse("only those of the table", NpuRuntime.isChip("SM8650X", "SM8650"));
        assertFalse(NpuRuntime.isChip("SM8635P", "SM8635"));
        assertFalse(NpuRuntime.isChip("SM8550", "SM8650"));
        assertFalse(NpuRuntime.isChip("", "SM8650"));
    }

    @Test
    public void aPluginThatIsNotThereIsSaid() {
        NpuRuntime.Settings settings =
                new NpuRuntime.Settings(
                        temporary.getRoot().toPath().resolve("libnothing.so").toString(), "libQnnHtp.so", "SM8650",
                        SdkVersion.parse("v2.51.0"), temporary.getRoot().toPath());
        MobileVdException error =
                Golden.assertFails(Problem.NPU_LIBRARY_FAILS, () -> NpuRuntime.start(settings));
        assertTrue(error.problem().isNpu());
    }

    @Test
    public void olderIsByReleaseNotByBuild() {
        SdkVersion needed = SdkVersion.parse("v2.51.0.260929181845");
        assertTrue(SdkVersion.parse("v2.50.9").isOlderThan(needed));
        assertTrue(SdkVersion.parse("v1.99.0").isOlderThan(needed));
        assertFalse(SdkVersion.parse("v2.51.0.250101000000").isOlderThan(needed));
        assertFalse(SdkVersion.parse("v2.51.1").isOlderThan(needed));
        assertFalse(SdkVersion.parse("v2.100.0").isOlderThan(needed));
        assertEquals("v2.51.0.260929181845", needed.toString());
    }

    @Test
    public void theVersionIsFoundWhereverItStandsInALibrary() throws Exception {
        Path library = temporary.getRoot().toPath().resolve("libQnnHtp.so");
        byte[] version = "v2.49.0.250101123456".getBytes(StandardCharsets.US_ASCII);
        for (int at : new int[] {0, 1000, (1 << 20) - 10, (1 << 20) - 20, 1 << 20, (1 << 21) - 45}) {
            byte[] content = new byte[(1 << 21) + 100];
            System.arraycopy(version, 0, content, at, version.length);
            Files.write(library, content);
            assertEquals("at " + at, "v2.49.0.250101123456", SdkVersion.ofLibrary(library).text());
        }
        Files.write(library, new byte[3 << 20]);
        assertNull(SdkVersion.ofLibrary(library));
        Files.delete(library);
        Golden.assertFails(Problem.FILE_UNREADABLE, () -> SdkVersion.ofLibrary(library));
    }
}
