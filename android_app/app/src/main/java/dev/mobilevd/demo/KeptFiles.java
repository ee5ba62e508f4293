package dev.mobilevd.demo;

import android.content.Context;
import android.graphics.Bitmap;
import dev.mobilevd.core.ByteSize;
import dev.mobilevd.core.Cancellation;
import dev.mobilevd.core.MobileVdException;
import dev.mobilevd.core.Problem;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.nio.file.Files;
import java.nio.file.StandardCopyOption;

/** Files that survive the process: the chosen picture and the last clip. */
final class KeptFiles {
    /** Above the size of every photograph. */
    static final long LARGEST_PICTURE = 128_000_000;
    private static final String PARTIAL = ".partial";

    private final File picture;
    private final File clip;

    KeptFiles(Context context) {
        picture = new File(context.getNoBackupFilesDir(), "picture");
        clip = new File(context.getNoBackupFilesDir(), "clip");
    }

    /** The chosen picture's file. */
    File picture() {
        return picture;
    }

    /** Preview of the chosen picture; null without one, or if it is not readable. */
    Bitmap preview() {
        try {
            return picture.exists() ? Pictures.preview(picture) : null;
        } catch (IOException error) {
            return null;
        }
    }

    /** Delete what an earlier process left while it replaced the picture. */
    void sweep() {
        File[] left = picture.getParentFile().listFiles((folder, name) -> name.matches("picture.*\\.partial"));
        for (File file : left == null ? new File[0] : left) {
            file.delete();
        }
    }

    /**
     * Replace the picture and return the preview of the new one. If it is not readable, the old one stays.
     *
     * @throws MobileVdException {@link Problem#IMAGE_TOO_LARGE}, {@link Problem#CANCELLED}
     */
    Bitmap replacePicture(InputStream in, Cancellation cancellation) throws IOException, MobileVdException {
        File partial = File.createTempFile("picture", PARTIAL, picture.getParentFile());
        try {
            try (OutputStream out = Files.newOutputStream(partial.toPath())) {
                copy(in, out, cancellation);
            }
            Bitmap preview = Pictures.preview(partial);
            cancellation.check();
            Files.move(partial.toPath(), picture.toPath(), StandardCopyOption.REPLACE_EXISTING);
            return preview;
        } finally {
            partial.delete();
        }
    }

    /** The last clip; null without one, or if it is not readable. */
    Result clip() {
        try {
            return clip.exists() ? Result.read(clip) : null;
        } catch (IOException error) {
            return null;
        }
    }

    void replaceClip(Result made) throws IOException {
        made.write(clip);
    }

    /** Whether the picture was chosen after the clip was made. */
    boolean isPictureNewer() {
        return picture.lastModified() > clip.lastModified();
    }

    private static void copy(InputStream in, OutputStream out, Cancellation cancellation)
            throws IOException, MobileVdException {
        byte[] buffer = new byte[1 << 16];
        long copied = 0;
        for (int count; (count = in.read(buffer)) >= 0; ) {
            cancellation.check();
            copied += count;
            if (copied > LARGEST_PICTURE) {
                throw new MobileVdException(Problem.IMAGE_TOO_LARGE, new ByteSize(LARGEST_PICTURE));
            }
            out.write(buffer, 0, count);
        }
    }
}
