package dev.mobilevd.demo;

import android.os.Handler;
import android.os.Looper;
import dev.mobilevd.core.Cancellation;
import dev.mobilevd.core.MobileVdException;
import java.io.IOException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.function.Consumer;

/** One thread that runs jobs in order. Their results go to the main thread. */
final class Worker {
    private final ExecutorService thread = Executors.newSingleThreadExecutor();
    private final Handler main = new Handler(Looper.getMainLooper());

    /** A job. */
    interface Task {
        void run(Cancellation cancellation) throws IOException, MobileVdException;
    }

    /** Run a task that handles its own errors. */
    void run(Runnable task) {
        thread.execute(task);
    }

    /**
     * Run a task that can be cancelled.
     *
     * @param failed receives the reason of a failure, on the worker's thread; a cancellation is none
     * @param ended is called at the end, on the worker's thread
     */
    void run(Task task, Cancellation cancellation, Consumer<Words> failed, Runnable ended) {
        thread.execute(
                () -> {
                    try {
                        task.run(cancellation);
                    } catch (MobileVdException problem) {
                        report(Words.of(problem), cancellation, failed);
                    } catch (IOException | RuntimeException | OutOfMemoryError | LinkageError error) {
                        report(Words.of(R.string.failed, Words.reason(error)), cancellation, failed);
                    } finally {
                        ended.run();
                    }
                });
    }

    /** A cancellation may appear as another error, for example of a stream that it closed. */
    private static void report(Words reason, Cancellation cancellation, Consumer<Words> failed) {
        if (!cancellation.isCancelled()) {
            failed.accept(reason);
        }
    }

    /** Call it on the main thread, in the order of the calls. */
    void post(Runnable change) {
        main.post(change);
    }

    /** Call it on the main thread later. */
    void postLater(Runnable change, long ms) {
        main.postDelayed(change, ms);
    }
}
