package dev.mobilevd.demo;

import android.content.ContentResolver;
import android.database.Cursor;
import android.net.Uri;
import android.provider.OpenableColumns;
import dev.mobilevd.core.Cancellation;
import dev.mobilevd.core.MobileVdException;
import java.io.IOException;
import java.io.InputStream;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Future;
import java.util.concurrent.RejectedExecutionException;
import java.util.concurrent.SynchronousQueue;
import java.util.concurrent.ThreadPoolExecutor;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

/**
 * Reads what other apps provide. Their code runs behind every call: it may throw any RuntimeException, or never return.
 * So it runs on threads of its own, and a cancellation abandons it.
 */
final class Incoming {
    // Calls that never return keep their threads. After this many, no further call is made.
    private static final int MOST_THREADS = 8;
    private static final long POLL_MS = 50;

    private final ContentResolver resolver;
    private final ExecutorService threads =
            new ThreadPoolExecutor(0, MOST_THREADS, 10, TimeUnit.SECONDS, new SynchronousQueue<>());

    /**
     * A file that another app offers.
     *
     * @param modelName its name without the extension, as a valid name of an artifact
     * @param bytes its size; -1 if the other app does not tell
     */
    record Offer(Uri uri, String modelName, long bytes) {
        /** The app that provides the file. */
        String source() {
            return String.valueOf(uri.getAuthority());
        }
    }

    Incoming(ContentResolver resolver) {
        this.resolver = resolver;
    }

    /** Run a task that reads from another app. Throws RejectedExecutionException if too many apps do not answer. */
    void run(Runnable task) {
        threads.execute(task);
    }

    /** Open a content: address. Others are refused: a file: address could name this app's own files. */
    InputStream open(Uri uri, Cancellation cancellation) throws IOException, MobileVdException {
        if (!ContentResolver.SCHEME_CONTENT.equals(uri.getScheme())) {
            throw new IOException(String.valueOf(uri));
        }
        InputStream in = await(() -> resolver.openInputStream(uri), cancellation);
        if (in == null) {
            throw new IOException(uri.toString());
        }
        return in;
    }

    /** Ask for the name and the size of a file. */
    Offer describe(Uri uri, Cancellation cancellation) throws IOException, MobileVdException {
        return await(() -> query(uri), cancellation);
    }

    private Offer query(Uri uri) {
        String name = null;
        long bytes = -1;
        String[] columns = {OpenableColumns.DISPLAY_NAME, OpenableColumns.SIZE};
        try (Cursor cursor = resolver.query(uri, columns, null, null, null)) {
            if (cursor != null && cursor.moveToFirst()) {
                int nameColumn = cursor.getColumnIndex(OpenableColumns.DISPLAY_NAME);
                int sizeColumn = cursor.getColumnIndex(OpenableColumns.SIZE);
                name = nameColumn < 0 ? null : cursor.getString(nameColumn);
                bytes = sizeColumn < 0 || cursor.isNull(sizeColumn) ? -1 : cursor.getLong(sizeColumn);
            }
        }
        return new Offer(uri, modelName(name == null ? uri.getLastPathSegment() : name), bytes);
    }

    private static String modelName(String file) {
        String name = file == null ? "" : file.replaceFirst("(?i)\\.(mvd|zip)$", "");
        name = name.replaceAll("[^A-Za-z0-9._-]+", "-").replaceFirst("^[^A-Za-z0-9]+", "");
        return name.isEmpty() ? "model" : name;
    }

    /** Wait for the other app, or for the cancellation. */
    private <T> T await(Callable<T> call, Cancellation cancellation) throws IOException, MobileVdException {
        Future<T> result;
        try {
            result = threads.submit(call);
        } catch (RejectedExecutionException error) {
            throw new IOException("other apps do not answer", error);
        }
        while (true) {
            try {
                return result.get(POLL_MS, TimeUnit.MILLISECONDS);
            } catch (TimeoutException waiting) {
                if (cancellation.isCancelled()) {
                    result.cancel(true);
                }
                cancellation.check();
            } catch (ExecutionException error) {
                if (error.getCause() instanceof RuntimeException cause) {
                    throw cause;
                }
                if (error.getCause() instanceof IOException cause) {
                    throw cause;
                }
                throw new IOException(error.getCause());
            } catch (InterruptedException error) {
                throw new IOException(error);
            }
        }
    }
}
