package dev.mobilevd.demo;

import android.content.ContentProvider;
import android.content.ContentUris;
import android.content.ContentValues;
import android.database.Cursor;
import android.database.MatrixCursor;
import android.net.Uri;
import android.os.ParcelFileDescriptor;
import java.io.File;
import java.io.FileNotFoundException;
import java.util.HashMap;
import java.util.Map;

/** A media store that records its entries. */
public final class FakeGallery extends ContentProvider {
    static final Map<Uri, ContentValues> ENTRIES = new HashMap<>();

    static File file(Uri uri) {
        return new File(System.getProperty("java.io.tmpdir"), "gallery-" + ContentUris.parseId(uri));
    }

    @Override
    public boolean onCreate() {
        ENTRIES.clear();
        return true;
    }

    @Override
    public Uri insert(Uri uri, ContentValues values) {
        Uri made = ContentUris.withAppendedId(uri, ENTRIES.size() + 1);
        ENTRIES.put(made, new ContentValues(values));
        return made;
    }

    @Override
    public ParcelFileDescriptor openFile(Uri uri, String mode) throws FileNotFoundException {
        return ParcelFileDescriptor.open(
                file(uri), ParcelFileDescriptor.parseMode(mode) | ParcelFileDescriptor.MODE_CREATE);
    }

    @Override
    public int update(Uri uri, ContentValues values, String selection, String[] arguments) {
        ENTRIES.get(uri).putAll(values);
        return 1;
    }

    @Override
    public int delete(Uri uri, String selection, String[] arguments) {
        return ENTRIES.remove(uri) == null ? 0 : 1;
    }

    @Override
    public Cursor query(Uri uri, String[] columns, String selection, String[] arguments, String order) {
        MatrixCursor cursor = new MatrixCursor(columns);
        if (ENTRIES.containsKey(uri)) {
            cursor.addRow(new Object[columns.length]);
        }
        return cursor;
    }

    @Override
    public String getType(Uri uri) {
        return "video/mp4";
    }
}
