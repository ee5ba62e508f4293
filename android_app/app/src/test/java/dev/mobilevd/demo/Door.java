package dev.mobilevd.demo;

import java.util.concurrent.CountDownLatch;

/** Where the app's worker stands and waits until a test lets it go on. */
final class Door {
    private final CountDownLatch reached = new CountDownLatch(1);
    private final CountDownLatch opened = new CountDownLatch(1);

    /** Whether the worker has come to it. */
    boolean isReached() {
        return reached.getCount() == 0;
    }

    void open() {
        opened.countDown();
    }

    void pass() {
        reached.countDown();
        try {
            opened.await();
        } catch (InterruptedException error) {
            throw new IllegalStateException(error);
        }
    }
}
