package dev.mobilevd.demo;

import java.util.concurrent.CountDownLatch;

/** Where the app's worker stands and waits until a test lets it go on. */
final class Door {
    private final CountDownLatch opened = new CountDownLatch(1);

    void open() {
        opened.countDown();
    }

    void pass() {
        try {
            opened.await();
        } catch (InterruptedException error) {
            throw new IllegalStateException(error);
        }
    }
}
