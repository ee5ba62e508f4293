package dev.mobilevd.demo;

import android.content.Context;
import android.graphics.Bitmap;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.nio.file.Files;
import java.nio.file.StandardCopyOption;

/** Files that survive the process: the chosen picture and the last clip. One thread uses them. */
final class KeptFiles {
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

    /** Replace the picture and return the preview of the new one. If it is not readable, the old one stays. */
    Bitmap replacePicture(InputStream in) throws IOException {
        File partial = new File(picture.getPath() + ".partial");
        try {
            try (OutputStream out = Files.newOutputStream(partial.toPath())) {
                copy(in, out);
            }
            Bitmap preview = Pictures.preview(partial);
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

    private static void copy(InputStream in, OutputStream out) throws IOException {
        byte[] buffer = new byte[1 << 16];
        for (int count; (count = in.read(buffer)) >= 0; ) {
            out.write(buffer, 0, count);
        }
    }
}
