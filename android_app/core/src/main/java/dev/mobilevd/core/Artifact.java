package dev.mobilevd.core;

import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.nio.file.FileVisitResult;
import java.nio.file.Files;
import java.nio.file.LinkOption;
import java.nio.file.Path;
import java.nio.file.SimpleFileVisitor;
import java.nio.file.attribute.BasicFileAttributes;
import java.util.Arrays;
import java.util.Collection;
import java.util.HashMap;
import java.util.Map;
import java.util.TreeMap;

/**
 * An artifact in a folder.
 *
 * @param manifestSha256 SHA-256 of manifest.json in hex; it identifies the artifact
 */
public record Artifact(Path root, Manifest manifest, String manifestSha256) {
    private static final int BUFFER = 1 << 18;

    /**
     * Read the artifact in {@code root}. Checks its structure and file sizes, but no digests.
     *
     * @throws MobileVdException a FILE_ problem for a file that is missing, extra, truncated or not plain; a MANIFEST_
     *     problem for a manifest that was changed or has another schema version
     */
    public static Artifact open(Path root) throws MobileVdException {
        for (String name : new String[] {Manifest.FILE, Manifest.DIGEST_FILE}) {
            if (!Files.isRegularFile(root.resolve(name), LinkOption.NOFOLLOW_LINKS)) {
                throw new MobileVdException(Problem.FILE_MISSING, name);
            }
        }
        try {
            byte[] text = Files.readAllBytes(root.resolve(Manifest.FILE));
            String sha256 = Sha256.of(text);
            checkDigest(sha256, Files.readAllBytes(root.resolve(Manifest.DIGEST_FILE)));
            Artifact artifact = new Artifact(root, Manifest.read(text), sha256);
            artifact.checkFiles();
            return artifact;
        } catch (IOException error) {
            throw new MobileVdException(
                    error, Problem.FILE_UNREADABLE, root.getFileName().toString(), error.toString());
        }
    }

    /** The path of a file of the manifest. */
    public Path path(Manifest.FileEntry entry) {
        return root.resolve(entry.path());
    }

    /**
     * Compare the SHA-256 of every file with the manifest.
     *
     * @throws MobileVdException {@link Problem#FILE_DAMAGED} if one differs, {@link Problem#FILE_UNREADABLE},
     *     {@link Problem#CANCELLED}
     */
    public void verify(Progress progress, Cancellation cancellation) throws MobileVdException {
        verify(manifest.allFiles(), progress, cancellation);
    }

    /** The same for some files. */
    public void verify(Collection<Manifest.FileEntry> entries, Progress progress, Cancellation cancellation)
            throws MobileVdException {
        long total = entries.stream().mapToLong(Manifest.FileEntry::bytes).sum();
        long done = 0;
        byte[] buffer = new byte[BUFFER];
        for (Manifest.FileEntry entry : entries) {
            Sha256 digest = new Sha256();
            try (InputStream input = Files.newInputStream(path(entry))) {
                for (int count; (count = input.read(buffer)) >= 0; ) {
                    cancellation.check();
                    digest.add(buffer, count);
                    done += count;
                    progress.at(Math.min(done, total), total);
                }
            } catch (IOException error) {
                throw new MobileVdException(error, Problem.FILE_UNREADABLE, entry.path(), error.toString());
            }
            if (!digest.hex().equals(entry.sha256())) {
                throw new MobileVdException(Problem.FILE_DAMAGED, entry.path());
            }
        }
    }

    /** Throws {@link Problem#MANIFEST_CHANGED} unless {@code line} is the right content of manifest.sha256. */
    static void checkDigest(String manifestSha256, byte[] line) throws MobileVdException {
        byte[] expected = (manifestSha256 + "  " + Manifest.FILE + "\n").getBytes(StandardCharsets.US_ASCII);
        if (!Arrays.equals(line, expected)) {
            throw new MobileVdException(Problem.MANIFEST_CHANGED);
        }
    }

    private void checkFiles() throws IOException, MobileVdException {
        Map<String, BasicFileAttributes> found = new TreeMap<>();
        Files.walkFileTree(
                root,
                new SimpleFileVisitor<Path>() {
                    @Override
                    public FileVisitResult visitFile(Path file, BasicFileAttributes attributes) {
                        found.put(root.relativize(file).toString().replace('\\', '/'), attributes);
                        return FileVisitResult.CONTINUE;
                    }
                });
        for (Map.Entry<String, BasicFileAttributes> file : found.entrySet()) {
            if (!file.getValue().isRegularFile()) {
                throw new MobileVdException(Problem.FILE_NOT_PLAIN, file.getKey());
            }
        }
        Map<String, BasicFileAttributes> extra = new HashMap<>(found);
        extra.remove(Manifest.FILE);
        extra.remove(Manifest.DIGEST_FILE);
        for (Manifest.FileEntry entry : manifest.allFiles()) {
            BasicFileAttributes attributes = extra.remove(entry.path());
            if (attributes == null) {
                throw new MobileVdException(Problem.FILE_MISSING, entry.path());
            }
            if (attributes.size() != entry.bytes()) {
                throw new MobileVdException(
                        Problem.FILE_SIZE, entry.path(), new ByteSize(attributes.size()), new ByteSize(entry.bytes()));
            }
        }
        if (!extra.isEmpty()) {
            throw new MobileVdException(Problem.FILE_EXTRA, new TreeMap<>(extra).firstKey());
        }
    }
}
