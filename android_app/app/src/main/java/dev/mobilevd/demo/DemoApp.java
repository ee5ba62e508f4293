package dev.mobilevd.demo;

import android.app.Application;

/** The process: what outlives screens. */
public final class DemoApp extends Application {
    private Device device;
    private Studio studio;

    @Override
    public void onCreate() {
        super.onCreate();
        start(new Device(this));
    }

    /** Begin anew on {@code device}; tests bring their own. */
    void start(Device device) {
        this.device = device;
        studio = new Studio(this, device);
    }

    Device device() {
        return device;
    }

    Studio studio() {
        return studio;
    }
}
