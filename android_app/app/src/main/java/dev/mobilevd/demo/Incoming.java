package dev.mobilevd.demo;

import android.content.ContentResolver;
import android.database.Cursor;
import android.net.Uri;
import android.provider.OpenableColumns;
import java.io.IOException;
import java.io.InputStream;

/** Reads what other apps provide. Their code runs behind every call and may throw any RuntimeException. */
final class Incoming {
    private final ContentResolver resolver;

    Incoming(ContentResolver resolver) {
        this.resolver = resolver;
    }

    /** Open a content: address. Others are refused: a file: address could name this app's own files. */
    InputStream open(Uri uri) throws IOException {
        if (!ContentResolver.SCHEME_CONTENT.equals(uri.getScheme())) {
            throw new IOException(String.valueOf(uri));
        }
        InputStream in = resolver.openInputStream(uri);
        if (in == null) {
            throw new IOException(uri.toString());
        }
        return in;
    }

    /** The file's name without its extension, as a valid name of an artifact. */
    String modelName(Uri uri) {
        String name = null;
        String[] columns = {OpenableColumns.DISPLAY_NAME};
        try (Cursor cursor = resolver.query(uri, columns, null, null, null)) {
            if (cursor != null && cursor.moveToFirst()) {
                name = cursor.getString(0);
            }
        }
        name = name == null ? uri.getLastPathSegment() : name;
        name = name == null ? "" : name.replaceFirst("(?i)\\.(mvd|zip)$", "");
        name = name.replaceAll("[^A-Za-z0-9._-]+", "-").replaceFirst("^[^A-Za-z0-9]+", "");
        return name.isEmpty() ? "model" : name;
    }
}
