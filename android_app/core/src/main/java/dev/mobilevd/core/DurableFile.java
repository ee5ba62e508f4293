package dev.mobilevd.core;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.StandardOpenOption;

/** Writes files atomically. */
final class DurableFile {
    private DurableFile() {}

    /** Write {@code content} to .NAME.partial, sync and rename it. Throws {@link Problem#NOT_WRITTEN}. */
    static void write(Path file, byte[] content) throws MobileVdException {
        Path aside = partial(file);
        try {
            try (FileChannel channel =
                    FileChannel.open(
                            aside,
                            StandardOpenOption.CREATE,
                            StandardOpenOption.TRUNCATE_EXISTING,
                            StandardOpenOption.WRITE)) {
                ByteBuffer bytes = ByteBuffer.wrap(content);
                while (bytes.hasRemaining()) {
                    channel.write(bytes);
                }
                channel.force(true);
            }
            Files.move(aside, file, StandardCopyOption.REPLACE_EXISTING, StandardCopyOption.ATOMIC_MOVE);
        } catch (IOException error) {
            throw new MobileVdException(error, Problem.NOT_WRITTEN, file.getFileName().toString(), error.toString());
        }
    }

    /** The file's path before it is renamed. */
    static Path partial(Path file) {
        return file.resolveSibling("." + file.getFileName() + ".partial");
    }
}
