package dev.mobilevd.demo;

import android.content.ContentResolver;
import android.content.ContentValues;
import android.database.Cursor;
import android.net.Uri;
import android.os.Build;
import android.os.Environment;
import android.os.ParcelFileDescriptor;
import android.provider.MediaStore;
import dev.mobilevd.core.Cancellation;
import dev.mobilevd.core.MobileVdException;
import java.io.FileDescriptor;
import java.io.IOException;

/** Adds clips to the gallery. */
final class Gallery {
    /** Encodes a clip into an empty, seekable file. */
    interface Encoder {
        /** @throws MobileVdException {@link dev.mobilevd.core.Problem#CANCELLED} */
        void write(Result clip, FileDescriptor target, Cancellation cancellation)
                throws IOException, MobileVdException;
    }

    private final ContentResolver resolver;
    private final Encoder encoder;

    Gallery(ContentResolver resolver, Encoder encoder) {
        this.resolver = resolver;
        this.encoder = encoder;
    }

    /** Whether a saved clip is still there. Another app may have deleted it. Slow. */
    boolean contains(Uri uri) {
        try (Cursor cursor = resolver.query(uri, new String[] {MediaStore.Video.Media._ID}, null, null, null)) {
            return cursor != null && cursor.getCount() > 0;
        } catch (RuntimeException error) { // the gallery's own, such as a lost permission
            return false;
        }
    }

    /** Save a clip. A failure leaves no entry. Slow. */
    Uri save(Result clip, Cancellation cancellation) throws IOException, MobileVdException {
        ContentValues values = new ContentValues();
        values.put(MediaStore.Video.Media.DISPLAY_NAME, "mobilevd-" + Long.toUnsignedString(clip.seed()) + ".mp4");
        values.put(MediaStore.Video.Media.MIME_TYPE, "video/mp4");
        Uri collection = MediaStore.Video.Media.EXTERNAL_CONTENT_URI;
        if (Build.VERSION.SDK_INT >= 29) {
            collection = MediaStore.Video.Media.getContentUri(MediaStore.VOLUME_EXTERNAL_PRIMARY);
            values.put(MediaStore.Video.Media.RELATIVE_PATH, Environment.DIRECTORY_MOVIES + "/MobileVD");
            values.put(MediaStore.Video.Media.IS_PENDING, 1);
        }
        Uri uri = resolver.insert(collection, values);
        if (uri == null) {
            throw new IOException("the gallery accepts no file");
        }
        boolean done = false;
        try {
            try (ParcelFileDescriptor file = resolver.openFileDescriptor(uri, "rw")) {
                if (file == null) {
                    throw new IOException("the gallery opens no file");
                }
                encoder.write(clip, file.getFileDescriptor(), cancellation);
            }
            if (Build.VERSION.SDK_INT >= 29) {
                ContentValues finished = new ContentValues();
                finished.put(MediaStore.Video.Media.IS_PENDING, 0);
                resolver.update(uri, finished, null, null);
            }
            done = true;
            return uri;
        } finally {
            if (!done) {
                resolver.delete(uri, null, null);
            }
        }
    }
}
