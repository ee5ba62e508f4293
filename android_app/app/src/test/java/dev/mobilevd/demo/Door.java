package dev.mobilevd.demo;

import java.util.concurrent.CountDownLatch;

/** Blocks the app's worker until the test opens it. */
final class Door {
    private final CountDownLatch reached = new CountDownLatch(1);
    private final CountDownLatch opened = new CountDownLatch(1);

    /** Whether the worker waits here, or has passed. */
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
