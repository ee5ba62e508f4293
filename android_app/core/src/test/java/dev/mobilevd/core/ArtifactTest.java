package dev.mobilevd.core;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertTrue;

import java.io.RandomAccessFile;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import org.junit.Before;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

public class ArtifactTest {
    @Rule public final TemporaryFolder temporary = new TemporaryFolder();
    private Path root;

    @Before
    public void copy() throws Exception {
        root = Golden.copy(temporary.getRoot().toPath().resolve("tiny"));
    }

    private MobileVdException assertNotOpened(Problem problem) {
        return Golden.assertFails(problem, () -> Artifact.open(root));
    }

    @Test
    public void opensAndVerifiesWithProgress() throws Exception {
        Artifact artifact = Artifact.open(root);
        List<Long> seen = new ArrayList<>();
        artifact.verify(
                (done, total) -> {
                    assertEquals(artifact.manifest().bytes(), total);
                    assertTrue(seen.isEmpty() || done >= seen.get(seen.size() - 1));
                    seen.add(done);
                },
                Golden.NEVER);
        assertEquals(artifact.manifest().bytes(), (long) seen.get(seen.size() - 1));
        String line = Golden.read(root.resolve(Manifest.DIGEST_FILE));
        assertEquals(line, artifact.manifestSha256() + "  manifest.json\n");
    }

    @Test
    public void anyFlippedByteOfAnyFileIsFound() throws Exception {
        for (Path file : Golden.files(root)) {
            byte[] intact = Files.readAllBytes(file);
            byte[] flipped = intact.clone();
            flipped[flipped.length / 2] ^= 1;
            Files.write(file, flipped);
            boolean manifest = file.getFileName().toString().startsWith("manifest.");
            MobileVdException error =
                    Golden.assertFails(
                            manifest ? Problem.MANIFEST_CHANGED : Problem.FILE_DAMAGED,
                            () -> Artifact.open(root).verify(Progress.NONE, Golden.NEVER));
            if (!manifest) {
                assertEquals(root.relativize(file).toString(), error.arguments().get(0));
            }
            Files.write(file, intact);
        }
    }

    @Test
    public void aTruncatedModelIsFoundBeforeItIsRead() throws Exception {
        try (RandomAccessFile model = new RandomAccessFile(root.resolve("unet/model.onnx").toFile(), "rw")) {
            model.setLength(model.length() - 1);
        }
        MobileVdException error = assertNotOpened(Problem.FILE_SIZE);
        assertEquals("unet/model.onnx", error.arguments().get(0));
        ByteSize found = (ByteSize) error.arguments().get(1);
        ByteSize expected = (ByteSize) error.arguments().get(2);
        assertEquals(1L, expected.bytes() - found.bytes());
    }

    @Test
    public void aHalfCopiedArtifactIsNamed() throws Exception {
        Files.delete(root.resolve("decoder/model.onnx.data"));
        assertEquals(
                List.of("decoder/model.onnx.data"), assertNotOpened(Problem.FILE_MISSING).arguments());
        Files.delete(root.resolve(Manifest.DIGEST_FILE));
        assertEquals(List.of("manifest.sha256"), assertNotOpened(Problem.FILE_MISSING).arguments());
    }

    @Test
    public void filesThatNobodyListedAreRefused() throws Exception {
        Files.createDirectories(root.resolve("unet/more"));
        Files.write(root.resolve("unet/more/x"), new byte[1]);
        assertEquals(List.of("unet/more/x"), assertNotOpened(Problem.FILE_EXTRA).arguments());
    }

    @Test
    public void aLinkIsNoFile() throws Exception {
        Path model = root.resolve("unet/model.onnx");
        Path elsewhere = temporary.getRoot().toPath().resolve("elsewhere.onnx");
        Files.move(model, elsewhere);
        Files.createSymbolicLink(model, elsewhere);
        assertNotOpened(Problem.FILE_NOT_PLAIN);
    }

    @Test
    public void aManifestThatIsALinkIsMissing() throws Exception {
        Path elsewhere = temporary.getRoot().toPath().resolve("manifest.json");
        Files.move(root.resolve(Manifest.FILE), elsewhere);
        Files.createSymbolicLink(root.resolve(Manifest.FILE), elsewhere);
        assertNotOpened(Problem.FILE_MISSING);
    }

    @Test
    public void anotherVersionIsSaidAndNotCalledDamage() throws Exception {
        Golden.rewriteManifest(root, "\"schema_version\": 1", "\"schema_version\": 3");
        assertEquals(List.of(3L, 1L), assertNotOpened(Problem.MANIFEST_VERSION).arguments());
    }

    @Test
    public void aFileThatVanishesMeanwhileIsSaid() throws Exception {
        Artifact artifact = Artifact.open(root);
        Files.delete(root.resolve("unet/model.onnx"));
        Golden.assertFails(Problem.FILE_UNREADABLE, () -> artifact.verify(Progress.NONE, Golden.NEVER));
    }

    @Test
    public void verifyingCanBeCancelled() throws Exception {
        Artifact artifact = Artifact.open(root);
        Cancellation cancellation = new Cancellation();
        Golden.assertFails(
                Problem.CANCELLED, () -> artifact.verify((done, total) -> cancellation.cancel(), cancellation));
    }
}
