package dev.mobilevd.core;

import java.io.ByteArrayOutputStream;
import java.io.FilterInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.FileVisitResult;
import java.nio.file.Files;
import java.nio.file.LinkOption;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.nio.file.SimpleFileVisitor;
import java.nio.file.StandardOpenOption;
import java.nio.file.attribute.BasicFileAttributes;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.TreeSet;
import java.util.function.ToLongFunction;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import java.util.zip.ZipEntry;
import java.util.zip.ZipInputStream;

/**
 * A folder with one subfolder per artifact, named after it.
 *
 * <p>An artifact is written to .NAME.installing, verified and renamed to NAME. Folders whose names begin with a dot are
 * not artifacts; .NAME.partial is one that adb is copying. Only one thread at a time may install or delete.
 */
public final class ArtifactStore {
    private static final Object RENAMING = new Object();
    private static final String REPLACED = ".replaced";
    private static final String INSTALLING = ".installing";
    private static final String DELETED = ".deleted";
    private static final int LARGEST_MANIFEST = 16 << 20;
    private static final int BUFFER = 1 << 18;
    // Deflate reaches at most 1032:1, and models far less than 100:1. Small files may exceed it: they are harmless.
    private static final long BOMB_RATIO = 100;
    private static final long BOMB_FROM_BYTES = 64 << 20;

    private final Path folder;
    private final ToLongFunction<Path> freeBytes;

    /** An entry of the store: an {@code artifact}, or the {@code problem} of a damaged one. The other is null. */
    public record Installed(String name, Artifact artifact, MobileVdException problem) {}

    /** A store in {@code folder}, which is created on first use. {@code freeBytes} returns the free space. */
    public ArtifactStore(Path folder, ToLongFunction<Path> freeBytes) {
        this.folder = folder;
        this.freeBytes = freeBytes;
    }

    /**
     * All artifacts, sorted by name. Damaged ones have a problem.
     *
     * @throws MobileVdException {@link Problem#FILE_UNREADABLE} if the store itself cannot be read
     */
    public List<Installed> list() throws MobileVdException {
        List<Path> folders;
        try {
            synchronized (RENAMING) {
                recover();
            }
            try (Stream<Path> children = Files.list(folder)) {
                folders =
                        children.filter(path -> Files.isDirectory(path) && !isHidden(path))
                                .sorted()
                                .collect(Collectors.toList());
            }
        } catch (NoSuchFileException error) {
            return List.of();
        } catch (IOException error) {
            throw new MobileVdException(error, Problem.FILE_UNREADABLE, folder.toString(), error.toString());
        }
        List<Installed> installed = new ArrayList<>();
        for (Path path : folders) {
            String name = path.getFileName().toString();
            try {
                installed.add(new Installed(name, Artifact.open(path), null));
            } catch (MobileVdException problem) {
                installed.add(new Installed(name, null, problem));
            }
        }
        return installed;
    }

    /**
     * Open one by its name.
     *
     * @throws MobileVdException {@link Problem#NOT_INSTALLED}, {@link Problem#NAME_INVALID}, or as
     *     {@link Artifact#open}
     */
    public Artifact open(String name) throws MobileVdException {
        Path path = path(name);
        if (!Files.isDirectory(path)) {
            throw new MobileVdException(Problem.NOT_INSTALLED, name);
        }
        return Artifact.open(path);
    }

    /** SHA-256 of an artifact's manifest, valid or not; of zero bytes without one. */
    String manifestSha256(String name) {
        try {
            return Sha256.of(Files.readAllBytes(path(name).resolve(Manifest.FILE)));
        } catch (IOException | MobileVdException error) {
            return Sha256.of(new byte[0]);
        }
    }

    /**
     * Install the artifact of a .mvd file: a zip whose entries are the artifact's files, manifest.json first.
     *
     * <p>Only paths and sizes that the manifest lists are accepted, each once. So no entry can leave the folder or fill
     * the disk. An artifact of the same name is replaced.
     *
     * @param zip is read to its end, but not closed
     * @param progress receives the bytes written, of those that the manifest lists
     * @return the installed artifact; all digests were checked
     * @throws MobileVdException an ARCHIVE_, FILE_ or MANIFEST_ problem, {@link Problem#NAME_INVALID},
     *     {@link Problem#NO_SPACE}, {@link Problem#NOT_WRITTEN}, {@link Problem#CANCELLED}; nothing is left behind
     */
    public Artifact installZip(InputStream zip, String name, Progress progress, Cancellation cancellation)
            throws MobileVdException {
        return install(name, partial -> unpack(zip, partial, progress, cancellation));
    }

    /** Opens the files of an artifact by their paths in it, from a folder or an app's assets. */
    @FunctionalInterface
    public interface Opener {
        /** Open a file; the caller closes it. */
        InputStream open(String path) throws IOException;
    }

    /**
     * Install a copy of an artifact, like {@link #installZip}.
     *
     * @throws MobileVdException {@link Problem#FILE_UNREADABLE} for a file that cannot be opened or read
     */
    public Artifact installFiles(Opener files, String name, Progress progress, Cancellation cancellation)
            throws MobileVdException {
        return install(name, partial -> copy(files, partial, progress, cancellation));
    }

    /**
     * Delete an artifact.
     *
     * @throws MobileVdException {@link Problem#NOT_INSTALLED}, {@link Problem#NAME_INVALID},
     *     {@link Problem#NOT_WRITTEN}
     */
    public void delete(String name) throws MobileVdException {
        Path path = path(name);
        if (!Files.isDirectory(path)) {
            throw new MobileVdException(Problem.NOT_INSTALLED, name);
        }
        try {
            // Renamed first, so that a partly deleted artifact is not listed as a damaged one.
            Path aside = folder.resolve("." + name + DELETED);
            removeTree(aside);
            synchronized (RENAMING) {
                Files.move(path, aside);
            }
            removeTree(aside);
        } catch (IOException error) {
            throw new MobileVdException(error, Problem.NOT_WRITTEN, name, error.toString());
        }
    }

    /**
     * Delete what an earlier process left when it ended during an installation or deletion. Call it before the first
     * installation of a process. What adb is copying stays.
     *
     * @throws MobileVdException {@link Problem#NOT_WRITTEN}
     */
    public void sweep() throws MobileVdException {
        try {
            for (Path path : hidden(INSTALLING, DELETED)) {
                removeTree(path);
            }
        } catch (NoSuchFileException error) {
            return; // no artifact was ever installed
        } catch (IOException error) {
            throw new MobileVdException(error, Problem.NOT_WRITTEN, folder.toString(), error.toString());
        }
    }

    /** The hidden folders with one of these suffixes. */
    private List<Path> hidden(String... suffixes) throws IOException {
        try (Stream<Path> children = Files.list(folder)) {
            return children.filter(
                            path ->
                                    isHidden(path)
                                            && Stream.of(suffixes)
                                                    .anyMatch(path.getFileName().toString()::endsWith))
                    .collect(Collectors.toList());
        }
    }

    private interface Filler {
        void fill(Path partial) throws IOException, MobileVdException;
    }

    private Artifact install(String name, Filler filler) throws MobileVdException {
        Path path = path(name);
        Path partial = folder.resolve("." + name + INSTALLING);
        try {
            Files.createDirectories(folder);
            removeTree(partial);
            Files.createDirectory(partial);
            filler.fill(partial);
            Artifact.open(partial);
            synchronized (RENAMING) {
                recover();
                if (Files.exists(path, LinkOption.NOFOLLOW_LINKS)) {
                    Files.move(path, folder.resolve("." + name + REPLACED));
                }
                Files.move(partial, path);
                recover();
            }
            return Artifact.open(path);
        } catch (IOException error) {
            throw new MobileVdException(error, Problem.NOT_WRITTEN, name, error.toString());
        } finally {
            try {
                removeTree(partial);
            } catch (IOException error) {
                // The folder is hidden, and the next installation of this name removes it.
            }
        }
    }

    /** Restore an artifact if the process ended while it was replaced; delete artifacts that were replaced. */
    private void recover() throws IOException {
        for (Path replaced : hidden(REPLACED)) {
            String hidden = replaced.getFileName().toString();
            Path path = folder.resolve(hidden.substring(1, hidden.length() - REPLACED.length()));
            if (Files.exists(path, LinkOption.NOFOLLOW_LINKS)) {
                removeTree(replaced);
            } else {
                Files.move(replaced, path);
            }
        }
    }

    private void unpack(InputStream stream, Path partial, Progress progress, Cancellation cancellation)
            throws IOException, MobileVdException {
        Unpacker zip = new Unpacker(stream);
        String first = zip.next();
        if (!Manifest.FILE.equals(first)) {
            throw first == null
                    ? new MobileVdException(Problem.ARCHIVE_UNREADABLE, "it is not a zip file")
                    : new MobileVdException(Problem.ARCHIVE_ORDER, first);
        }
        byte[] text = readSmall(Manifest.FILE, buffer -> zip.read(Manifest.FILE, buffer));
        Manifest manifest = Manifest.read(text);
        Writer writer = new Writer(partial, manifest.bytes() + text.length, progress, cancellation);
        writer.write(Manifest.FILE, text);

        Map<String, Manifest.FileEntry> listed = new HashMap<>();
        manifest.allFiles().forEach(entry -> listed.put(entry.path(), entry));
        Set<String> seen = new HashSet<>(Set.of(Manifest.FILE));
        for (String next; (next = zip.next()) != null; ) {
            String path = next;
            if (!path.equals(Manifest.DIGEST_FILE) && !path.equals(Manifest.FILE) && !listed.containsKey(path)) {
                throw new MobileVdException(Problem.ARCHIVE_FOREIGN, path);
            }
            if (!seen.add(path)) {
                throw new MobileVdException(Problem.ARCHIVE_TWICE, path);
            }
            if (path.equals(Manifest.DIGEST_FILE)) {
                byte[] line = readSmall(path, buffer -> zip.read(path, buffer));
                Artifact.checkDigest(Sha256.of(text), line);
                writer.write(path, line);
            } else {
                writer.write(listed.get(path), buffer -> zip.read(path, buffer));
            }
        }
        Set<String> missing = new TreeSet<>(listed.keySet());
        missing.add(Manifest.DIGEST_FILE);
        missing.removeAll(seen);
        if (!missing.isEmpty()) {
            throw new MobileVdException(Problem.ARCHIVE_SHORT, missing.iterator().next());
        }
    }

    private void copy(Opener files, Path partial, Progress progress, Cancellation cancellation)
            throws IOException, MobileVdException {
        byte[] text = readSmall(files, Manifest.FILE);
        byte[] line = readSmall(files, Manifest.DIGEST_FILE);
        Artifact.checkDigest(Sha256.of(text), line);
        Manifest manifest = Manifest.read(text);
        Writer writer = new Writer(partial, manifest.bytes(), progress, cancellation);
        writer.write(Manifest.FILE, text);
        writer.write(Manifest.DIGEST_FILE, line);
        for (Manifest.FileEntry entry : manifest.allFiles()) {
            try (InputStream input = open(files, entry.path())) {
                writer.write(entry, buffer -> read(input, entry.path(), buffer));
            }
        }
    }

    private static InputStream open(Opener files, String path) throws MobileVdException {
        try {
            return files.open(path);
        } catch (IOException error) {
            throw new MobileVdException(error, Problem.FILE_UNREADABLE, path, error.toString());
        }
    }

    private static int read(InputStream input, String path, byte[] buffer) throws MobileVdException {
        try {
            return input.read(buffer);
        } catch (IOException error) {
            throw new MobileVdException(error, Problem.FILE_UNREADABLE, path, error.toString());
        }
    }

    private static byte[] readSmall(Opener files, String path) throws IOException, MobileVdException {
        try (InputStream input = open(files, path)) {
            return readSmall(path, buffer -> read(input, path, buffer));
        }
    }

    private static byte[] readSmall(String path, Source source) throws IOException, MobileVdException {
        ByteArrayOutputStream content = new ByteArrayOutputStream();
        byte[] buffer = new byte[1 << 14];
        for (int count; (count = source.read(buffer)) >= 0; ) {
            content.write(buffer, 0, count);
            if (content.size() > LARGEST_MANIFEST) {
                throw new MobileVdException(Problem.ARCHIVE_BOMB, path);
            }
        }
        return content.toByteArray();
    }

    /** Reads the next bytes of a file, like {@link InputStream#read(byte[])}. */
    private interface Source {
        int read(byte[] buffer) throws IOException, MobileVdException;
    }

    /** Writes an artifact's files below a folder and checks their sizes and digests. */
    private final class Writer {
        private final Path root;
        private final long total;
        private final Progress progress;
        private final Cancellation cancellation;
        private final byte[] buffer = new byte[BUFFER];
        private long done;

        Writer(Path root, long total, Progress progress, Cancellation cancellation) throws MobileVdException {
            this.root = root;
            this.total = total;
            this.progress = progress;
            this.cancellation = cancellation;
            long free = freeBytes.applyAsLong(root);
            if (free < total) {
                throw new MobileVdException(Problem.NO_SPACE, new ByteSize(total), new ByteSize(free));
            }
        }

        void write(String path, byte[] content) throws IOException {
            Files.write(root.resolve(path), content);
        }

        void write(Manifest.FileEntry entry, Source source) throws IOException, MobileVdException {
            Path path = root.resolve(entry.path());
            Files.createDirectories(path.getParent());
            Sha256 digest = new Sha256();
            long size = 0;
            try (FileChannel channel =
                    FileChannel.open(path, StandardOpenOption.CREATE_NEW, StandardOpenOption.WRITE)) {
                for (int count; (count = source.read(buffer)) >= 0; ) {
                    cancellation.check();
                    size += count;
                    if (size > entry.bytes()) {
                        throw new MobileVdException(
                                Problem.FILE_SIZE, entry.path(), new ByteSize(size), new ByteSize(entry.bytes()));
                    }
                    digest.add(buffer, count);
                    writeFully(channel, count);
                    done += count;
                    progress.at(Math.min(done, total), total);
                }
                channel.force(true);
            }
            if (size != entry.bytes()) {
                throw new MobileVdException(
                        Problem.FILE_SIZE, entry.path(), new ByteSize(size), new ByteSize(entry.bytes()));
            }
            if (!digest.hex().equals(entry.sha256())) {
                throw new MobileVdException(Problem.FILE_DAMAGED, entry.path());
            }
        }

        private void writeFully(FileChannel channel, int count) throws IOException, MobileVdException {
            try {
                ByteBuffer bytes = ByteBuffer.wrap(buffer, 0, count);
                while (bytes.hasRemaining()) {
                    channel.write(bytes);
                }
            } catch (IOException error) {
                long free = freeBytes.applyAsLong(root);
                if (free < total - done) {
                    throw new MobileVdException(
                            error, Problem.NO_SPACE, new ByteSize(total - done), new ByteSize(free));
                }
                throw error;
            }
        }
    }

    /** Reads a zip that is not trusted. Any error in it is {@link Problem#ARCHIVE_UNREADABLE}. */
    private static final class Unpacker {
        private final CountingStream packed;
        private final ZipInputStream zip;
        private long unpacked;

        Unpacker(InputStream stream) {
            packed = new CountingStream(stream);
            zip = new ZipInputStream(packed);
        }

        /** Go to the next entry and return its path; null after the last. */
        String next() throws MobileVdException {
            try {
                ZipEntry entry = zip.getNextEntry();
                return entry == null ? null : entry.getName();
            } catch (IOException | IllegalArgumentException error) { // the latter for a name that is not UTF-8
                throw new MobileVdException(error, Problem.ARCHIVE_UNREADABLE, error.toString());
            }
        }

        int read(String path, byte[] buffer) throws MobileVdException {
            int count;
            try {
                count = zip.read(buffer);
            } catch (IOException error) {
                throw new MobileVdException(error, Problem.ARCHIVE_UNREADABLE, error.toString());
            }
            unpacked += Math.max(count, 0);
            if (unpacked > BOMB_FROM_BYTES && unpacked / BOMB_RATIO > packed.count) {
                throw new MobileVdException(Problem.ARCHIVE_BOMB, path);
            }
            return count;
        }
    }

    private static final class CountingStream extends FilterInputStream {
        private long count;

        CountingStream(InputStream stream) {
            super(stream);
        }

        @Override
        public int read() throws IOException {
            int value = super.read();
            count += value < 0 ? 0 : 1;
            return value;
        }

        @Override
        public int read(byte[] buffer, int offset, int length) throws IOException {
            int got = super.read(buffer, offset, length);
            count += Math.max(got, 0);
            return got;
        }
    }

    private Path path(String name) throws MobileVdException {
        if (!Manifest.NAME.matcher(name).matches()) {
            throw new MobileVdException(Problem.NAME_INVALID, name);
        }
        return folder.resolve(name);
    }

    private static boolean isHidden(Path path) {
        return path.getFileName().toString().startsWith(".");
    }

    private static void removeTree(Path root) throws IOException {
        if (!Files.exists(root, LinkOption.NOFOLLOW_LINKS)) {
            return;
        }
        Files.walkFileTree(
                root,
                new SimpleFileVisitor<Path>() {
                    @Override
                    public FileVisitResult visitFile(Path file, BasicFileAttributes attributes) throws IOException {
                        Files.delete(file);
                        return FileVisitResult.CONTINUE;
                    }

                    @Override
                    public FileVisitResult postVisitDirectory(Path visited, IOException error) throws IOException {
                        if (error != null) {
                            throw error;
                        }
                        Files.delete(visited);
                        return FileVisitResult.CONTINUE;
                    }
                });
    }
}
