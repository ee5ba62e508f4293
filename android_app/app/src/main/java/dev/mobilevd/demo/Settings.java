package dev.mobilevd.demo;

import android.content.Context;
import android.content.SharedPreferences;

/** The few values that are kept between starts. */
final class Settings {
    static final String MODEL = "model";
    static final String SEED = "seed";
    static final String CPU_ONLY = "cpu_only";
    static final String BUNDLED = "bundled";

    private Settings() {}

    static SharedPreferences of(Context context) {
        return context.getSharedPreferences("settings", Context.MODE_PRIVATE);
    }
}
