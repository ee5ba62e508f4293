package dev.mobilevd.core;

import static org.junit.Assert.assertArrayEquals;
import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertNotNull;
import static org.junit.Assert.assertNull;
import static org.junit.Assert.assertTrue;

import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import java.util.zip.CRC32;
import java.util.zip.ZipEntry;
import java.util.zip.ZipOutputStream;
import org.junit.Before;
import org.junit.Rule;
import org.junit.Test;
import org.junit.rules.TemporaryFolder;

public class ArtifactStoreTest {
    @Rule public final TemporaryFolder temporary = new TemporaryFolder();
    private Path folder;
    private ArtifactStore store;

    @Before
    public void make() {
        folder = temporary.getRoot().toPath().resolve("artifacts");
        store = new ArtifactStore(folder, path -> Long.MAX_VALUE);
    }

    /** The tiny artifact's files by path, manifest first. */
    private static Map<String, byte[]> entries() throws IOException {
        Map<String, byte[]> entries = new LinkedHashMap<>();
        for (String name : List.of(Manifest.FILE, Manifest.DIGEST_FILE)) {
            entries.put(name, Files.readAllBytes(Golden.ARTIFACT.resolve(name)));
        }
        for (Path file : Golden.files(Golden.ARTIFACT)) {
            entries.putIfAbsent(Golden.ARTIFACT.relativize(file).toString(), Files.readAllBytes(file));
        }
        return entries;
    }

    private static byte[] zip(Map<String, byte[]> entries, boolean stored) throws IOException {
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        try (ZipOutputStream zip = new ZipOutputStream(bytes)) {
            for (Map.Entry<String, byte[]> entry : entries.entrySet()) {
                ZipEntry header = new ZipEntry(entry.getKey());
                if (stored) {
                    CRC32 crc = new CRC32();
                    crc.update(entry.getValue());
                    header.setMethod(ZipEntry.STORED);
                    header.setSize(entry.getValue().length);
                    header.setCrc(crc.getValue());
                }
                zip.putNextEntry(header);
                zip.write(entry.getValue());
            }
        }
        return bytes.toByteArray();
    }

    private Artifact install(byte[] zip) throws MobileVdException {
        return store.installZip(new ByteArrayInputStream(zip), "tiny", Progress.NONE, Golden.NEVER);
    }

    /** The installation must fail with this problem and leave no file inside or outside of the store. */
    private MobileVdException assertRefused(Problem problem, byte[] zip) throws Exception {
        MobileVdException error = Golden.assertFails(problem, () -> install(zip));
        assertNothingLeft();
        return error;
    }

    private void assertNothingLeft() throws IOException {
        try (Stream<Path> paths = Files.walk(temporary.getRoot().toPath())) {
            List<Path> left =
                    paths.filter(p -> !p.equals(folder) && !p.equals(folder.getParent()))
                            .collect(Collectors.toList());
            assertEquals(List.of(), left);
        }
    }

    private MobileVdException assertRefused(Problem problem, Map<String, byte[]> entries) throws Exception {
        return assertRefused(problem, zip(entries, false));
    }

    private List<String> names() throws MobileVdException {
        return store.list().stream().map(ArtifactStore.Installed::name).collect(Collectors.toList());
    }

    @Test
    public void installsAZipWhetherStoredOrDeflated() throws Exception {
        for (boolean stored : new boolean[] {true, false}) {
            List<Long> seen = new ArrayList<>();
            InputStream zip = new ByteArrayInputStream(zip(entries(), stored));
            Artifact artifact = store.installZip(zip, "tiny", (done, total) -> seen.add(done), Golden.NEVER);
            assertEquals(folder.resolve("tiny"), artifact.root());
            artifact.verify(Progress.NONE, Golden.NEVER);
            for (Map.Entry<String, byte[]> entry : entries().entrySet()) {
                assertArrayEquals(entry.getValue(), Files.readAllBytes(artifact.root().resolve(entry.getKey())));
            }
            assertEquals(artifact.manifest().bytes(), seen.get(seen.size() - 1), 20_000);
            assertEquals(List.of("tiny"), names());
        }
    }

    @Test
    public void installsFromWhereverFilesCanBeOpened() throws Exception {
        store.installFiles(
                path -> Files.newInputStream(Golden.ARTIFACT.resolve(path)), "demo", Progress.NONE, Golden.NEVER);
        store.open("demo").verify(Progress.NONE, Golden.NEVER);
        Path broken = Golden.copy(temporary.newFolder().toPath().resolve("broken"));
        Files.delete(broken.resolve("unet/model.onnx"));
        Golden.assertFails(
                Problem.FILE_UNREADABLE,
                () ->
                        store.installFiles(
                                path -> Files.newInputStream(broken.resolve(path)), "b", Progress.NONE, Golden.NEVER));
        assertEquals(List.of("demo"), names());
    }

    @Test
    public void listsDamagedOnesWithTheirProblemAndHiddenOnesNot() throws Exception {
        assertEquals(List.of(), store.list());
        Golden.copy(folder.resolve("good"));
        Golden.copy(folder.resolve(".half.partial"));
        Golden.copy(folder.resolve("bad"));
        Files.delete(folder.resolve("bad/report.html"));
        Files.write(folder.resolve("note.txt"), new byte[3]);
        List<ArtifactStore.Installed> found = store.list();
        assertEquals(List.of("bad", "good"), names());
        assertNull(found.get(0).artifact());
        assertEquals(Problem.FILE_MISSING, found.get(0).problem().problem());
        assertNotNull(found.get(1).artifact());
        assertNull(found.get(1).problem());
    }

    @Test
    public void aNewOneReplacesTheOldOneOfItsName() throws Exception {
        install(zip(entries(), false));
        Path other = Golden.copy(temporary.newFolder().toPath().resolve("other"));
        Golden.rewriteManifest(other, "2025-01-31T12:00:00Z", "2025-02-01T12:00:00Z");
        store.installFiles(path -> Files.newInputStream(other.resolve(path)), "tiny", Progress.NONE, Golden.NEVER);
        assertEquals("2025-02-01T12:00:00Z", store.open("tiny").manifest().created());
        try (Stream<Path> children = Files.list(folder)) {
            assertEquals(1, children.count());
        }
    }

    @Test
    public void aFailedInstallLeavesTheOldOne() throws Exception {
        install(zip(entries(), false));
        Map<String, byte[]> entries = entries();
        entries.get("unet/model.onnx")[3] ^= 1;
        byte[] zip = zip(entries, false);
        Golden.assertFails(Problem.FILE_DAMAGED, () -> install(zip));
        store.open("tiny").verify(Progress.NONE, Golden.NEVER);
        assertEquals(List.of("tiny"), names());
    }

    @Test
    public void deletes() throws Exception {
        install(zip(entries(), false));
        store.delete("tiny");
        assertNothingLeft();
        Golden.assertFails(Problem.NOT_INSTALLED, () -> store.delete("tiny"));
        Golden.assertFails(Problem.NOT_INSTALLED, () -> store.open("tiny"));
    }

    @Test
    public void namesThatLeaveTheStoreAreRefused() throws Exception {
        byte[] zip = zip(entries(), false);
        for (String name : List.of("", ".", "..", "../x", "a/b", ".hidden", "a\\b", "ä", "a\0b")) {
            Golden.assertFails(
                    Problem.NAME_INVALID,
                    () -> store.installZip(new ByteArrayInputStream(zip), name, Progress.NONE, Golden.NEVER));
            Golden.assertFails(Problem.NAME_INVALID, () -> store.delete(name));
        }
        assertFalse(Files.exists(folder));
    }

    @Test
    public void zipSlipIsRefused() throws Exception {
        for (String path :
                List.of(
                        "../evil", "unet/../../evil", "/evil", "..\\evil", "unet/../unet/model.onnx",
                        "./report.html")) {
            Map<String, byte[]> entries = entries();
            entries.put(path, new byte[10]);
            MobileVdException error = Golden.assertFails(Problem.ARCHIVE_FOREIGN, () -> install(zip(entries, false)));
            assertEquals(List.of(path), error.arguments());
            assertNothingLeft();
        }
    }

    @Test
    public void aManifestThatSlipsIsRefused() throws Exception {
        Path copy = Golden.copy(temporary.newFolder("copy").toPath().resolve("x"));
        Golden.rewriteManifest(copy, "\"report.html\"", "\"../report.html\"");
        Map<String, byte[]> entries = entries();
        entries.put(Manifest.FILE, Files.readAllBytes(copy.resolve(Manifest.FILE)));
        entries.put(Manifest.DIGEST_FILE, Files.readAllBytes(copy.resolve(Manifest.DIGEST_FILE)));
        Golden.assertFails(Problem.MANIFEST_INVALID, () -> install(zip(entries, false)));
        assertEquals(List.of(), names());
    }

    @Test
    public void pathsInAnotherCaseAreRefused() throws Exception {
        Map<String, byte[]> entries = entries();
        entries.put("UNET/model.onnx", entries.remove("unet/model.onnx"));
        assertEquals(List.of("UNET/model.onnx"), assertRefused(Problem.ARCHIVE_FOREIGN, entries).arguments());
        Map<String, byte[]> capital = new LinkedHashMap<>();
        capital.put("Manifest.json", entries().get(Manifest.FILE));
        assertRefused(Problem.ARCHIVE_ORDER, capital);
    }

    @Test
    public void entriesThatStandTwiceAreRefused() throws Exception {
        for (String path : List.of("report.html", "manifest.json", "manifest.sha256")) {
            Map<String, byte[]> entries = entries();
            entries.put("second", entries.get(path)); // renamed below: ZipOutputStream refuses duplicates
            byte[] zip = renamed(zip(entries, true), "second", path);
            assertEquals(List.of(path), assertRefused(Problem.ARCHIVE_TWICE, zip).arguments());
        }
    }

    /** Rename an entry of a zip, in all of its headers. */
    private static byte[] renamed(byte[] zip, String from, String to) {
        byte[] name = from.getBytes(StandardCharsets.US_ASCII);
        ByteArrayOutputStream made = new ByteArrayOutputStream();
        for (int i = 0; i < zip.length; i++) {
            boolean here =
                    i >= 30
                            && i + name.length <= zip.length
                            && zip[i - 30] == 'P' && zip[i - 29] == 'K' && zip[i - 28] == 3
                            && Arrays.equals(Arrays.copyOfRange(zip, i, i + name.length), name);
            if (here) {
                byte[] all = made.toByteArray();
                all[i - 4] = (byte) to.length();
                made.reset();
                made.write(all, 0, all.length);
                made.writeBytes(to.getBytes(StandardCharsets.US_ASCII));
                i += name.length - 1;
            } else {
                made.write(zip[i]);
            }
        }
        return made.toByteArray();
    }

    @Test
    public void aLinkInAZipIsWrittenAsWhatItIsAndRefused() throws Exception {
        // The content of a link's entry is its target. The store never creates links.
        Map<String, byte[]> entries = entries();
        entries.put("report.html", "/etc/hostname".getBytes(StandardCharsets.US_ASCII));
        byte[] zip = zip(entries, true);
        markAsLink(zip, "report.html");
        assertEquals("report.html", assertRefused(Problem.FILE_SIZE, zip).arguments().get(0));
    }

    /** Set Unix mode 0120777 in the central directory. */
    private static void markAsLink(byte[] zip, String path) {
        byte[] name = path.getBytes(StandardCharsets.US_ASCII);
        for (int i = 46; i + name.length <= zip.length; i++) {
            boolean central = zip[i - 46] == 'P' && zip[i - 45] == 'K' && zip[i - 44] == 1 && zip[i - 43] == 2;
            if (central && Arrays.equals(Arrays.copyOfRange(zip, i, i + name.length), name)) {
                zip[i - 41] = 3; // created on Unix
                zip[i - 6] = (byte) 0xFF;
                zip[i - 5] = (byte) 0xA1;
                return;
            }
        }
        throw new AssertionError(path);
    }

    @Test
    public void aFileLargerThanItsEntryInTheManifestStopsAtOnce() throws Exception {
        Map<String, byte[]> entries = entries();
        entries.put("unet/model.onnx", new byte[50 << 20]); // 50 MB of zeros, 50 kB packed
        List<Long> seen = new ArrayList<>();
        InputStream zip = new ByteArrayInputStream(zip(entries, false));
        Golden.assertFails(
                Problem.FILE_SIZE,
                () -> store.installZip(zip, "tiny", (done, total) -> seen.add(done), Golden.NEVER));
        assertTrue(seen.get(seen.size() - 1) < 100_000);
        assertNothingLeft();
    }

    @Test
    public void aBombIsStoppedEvenIfItsManifestListsIt() throws Exception {
        byte[] zeros = new byte[80 << 20];
        Path copy = Golden.copy(temporary.newFolder("copy").toPath().resolve("x"));
        Manifest.FileEntry report = Artifact.open(copy).manifest().files().get("report");
        Golden.rewriteManifest(copy, report.sha256(), Sha256.of(zeros));
        Golden.rewriteManifest(copy, "\"bytes\": " + report.bytes(), "\"bytes\": " + zeros.length);
        Map<String, byte[]> entries = entries();
        entries.put(Manifest.FILE, Files.readAllBytes(copy.resolve(Manifest.FILE)));
        entries.put(Manifest.DIGEST_FILE, Files.readAllBytes(copy.resolve(Manifest.DIGEST_FILE)));
        entries.put("report.html", zeros);
        byte[] zip = zip(entries, false);
        assertTrue(zip.length < 1 << 20);
        Golden.assertFails(Problem.ARCHIVE_BOMB, () -> install(zip));
        assertEquals(List.of(), names());
    }

    @Test
    public void aManifestWithoutEndIsABomb() throws Exception {
        Map<String, byte[]> entries = new LinkedHashMap<>();
        entries.put(Manifest.FILE, new byte[17 << 20]);
        assertRefused(Problem.ARCHIVE_BOMB, entries);
    }

    @Test
    public void whatIsNoZipIsSaid() throws Exception {
        assertRefused(Problem.ARCHIVE_UNREADABLE, new byte[0]);
        assertRefused(Problem.ARCHIVE_UNREADABLE, "not a zip file at all, only text".getBytes(StandardCharsets.UTF_8));
        assertRefused(Problem.ARCHIVE_UNREADABLE, new byte[] {'P', 'K', 3, 4});
        Map<String, byte[]> other = new LinkedHashMap<>();
        other.put("holiday.jpg", new byte[5]);
        other.putAll(entries());
        assertEquals(List.of("holiday.jpg"), assertRefused(Problem.ARCHIVE_ORDER, other).arguments());
    }

    @Test
    public void aZipCutAnywhereIsRefused() throws Exception {
        byte[] whole = zip(entries(), false);
        for (int length = 40; length < whole.length - 2500; length += 2999) {
            byte[] cut = Arrays.copyOf(whole, length);
            try {
                install(cut);
                throw new AssertionError("a zip cut at " + length + " was installed");
            } catch (MobileVdException error) {
                assertTrue(
                        error.getMessage(),
                        List.of(Problem.ARCHIVE_UNREADABLE, Problem.ARCHIVE_SHORT).contains(error.problem()));
            }
            assertNothingLeft();
        }
    }

    @Test
    public void damageInAZipIsRefused() throws Exception {
        Map<String, byte[]> entries = entries();
        entries.get("decoder/model.onnx.data")[7] ^= 1;
        assertRefused(Problem.FILE_DAMAGED, entries);
        Map<String, byte[]> digest = entries();
        digest.get(Manifest.DIGEST_FILE)[0] ^= 1;
        assertRefused(Problem.MANIFEST_CHANGED, digest);
        Map<String, byte[]> without = entries();
        without.remove(Manifest.DIGEST_FILE);
        assertEquals(List.of("manifest.sha256"), assertRefused(Problem.ARCHIVE_SHORT, without).arguments());
        Map<String, byte[]> shorter = entries();
        shorter.put("report.html", new byte[1]);
        assertRefused(Problem.FILE_SIZE, shorter);
    }

    @Test
    public void noSpaceIsSaidInNumbersBeforeAnythingIsWritten() throws Exception {
        ArtifactStore full = new ArtifactStore(folder, path -> 5_000L);
        byte[] zip = zip(entries(), false);
        MobileVdException error =
                Golden.assertFails(
                        Problem.NO_SPACE,
                        () -> full.installZip(new ByteArrayInputStream(zip), "tiny", Progress.NONE, Golden.NEVER));
        assertEquals(new ByteSize(5_000), error.arguments().get(1));
        assertTrue(((ByteSize) error.arguments().get(0)).bytes() > 5_000);
        assertTrue(error.getMessage(), error.getMessage().contains("5.00 kB are free"));
        assertNothingLeft();
    }

    @Test
    public void aFolderThatCannotBeWrittenIsSaid() throws Exception {
        Files.write(folder, new byte[1]);
        byte[] zip = zip(entries(), false);
        Golden.assertFails(Problem.NOT_WRITTEN, () -> install(zip));
    }

    @Test
    public void aCancelledInstallLeavesNothing() throws Exception {
        Cancellation cancellation = new Cancellation();
        byte[] zip = zip(entries(), false);
        Golden.assertFails(
                Problem.CANCELLED,
                () ->
                        store.installZip(
                                new ByteArrayInputStream(zip), "tiny", (done, total) -> cancellation.cancel(),
                                cancellation));
        assertNothingLeft();
    }

    @Test
    public void whatAKilledInstallLeftIsNoHindrance() throws Exception {
        Golden.copy(folder.resolve(".tiny.installing"));
        Golden.copy(folder.resolve(".tiny.deleted"));
        assertEquals(List.of(), names());
        install(zip(entries(), false));
        assertEquals(List.of("tiny"), names());
        store.delete("tiny");
        assertNothingLeft();
    }

    @Test
    public void whatWasReplacedComesBackIfThatWasKilledHalfWay() throws Exception {
        Golden.copy(folder.resolve(".tiny.replaced"));
        assertEquals(List.of("tiny"), names());
        Golden.copy(folder.resolve(".tiny.replaced"));
        assertEquals(List.of("tiny"), names());
        try (Stream<Path> children = Files.list(folder)) {
            assertEquals(1, children.count());
        }
    }

    @Test
    public void whatAKilledProcessLeftIsSweptButNotWhatAdbCopies() throws Exception {
        for (String name : List.of(".a.installing", ".b.deleted", ".c.partial", ".d.old")) {
            Golden.copy(folder.resolve(name));
        }
        store.sweep();
        try (var left = Files.list(folder)) {
            assertEquals(
                    List.of(folder.resolve(".c.partial"), folder.resolve(".d.old")),
                    left.sorted().collect(Collectors.toList()));
        }
    }
}
