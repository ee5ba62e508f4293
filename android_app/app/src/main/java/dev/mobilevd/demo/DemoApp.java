package dev.mobilevd.demo;

import android.app.Application;

/** Objects that belong to the process. */
public final class DemoApp extends Application {
    private Device device;
    private Studio studio;

    @Override
    public void onCreate() {
        super.onCreate();
        start(new Device(this));
    }

    /** Start with a device. Tests call it again with a fake one. */
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
