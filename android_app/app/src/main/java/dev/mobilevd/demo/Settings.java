package dev.mobilevd.demo;

import android.content.Context;
import android.content.SharedPreferences;

/** Values that survive the process. */
final class Settings {
    private static final String MODEL = "model";
    private static final String SEED = "seed";
    private static final String CPU_ONLY = "cpu_only";
    private static final String BUNDLED = "bundled";
    private static final String ASKED_TO_NOTIFY = "asked_to_notify";
    private static final String NPU_STARTING = "npu_starting";

    private final SharedPreferences values;

    Settings(Context context) {
        values = context.getSharedPreferences("settings", Context.MODE_PRIVATE);
    }

    /** Name of the chosen model; null if none was chosen. */
    String model() {
        return values.getString(MODEL, null);
    }

    void setModel(String name) {
        values.edit().putString(MODEL, name).apply();
    }

    String seed() {
        return values.getString(SEED, "1");
    }

    void setSeed(String text) {
        values.edit().putString(SEED, text).apply();
    }

    boolean cpuOnly() {
        return values.getBoolean(CPU_ONLY, false);
    }

    void setCpuOnly(boolean only) {
        values.edit().putBoolean(CPU_ONLY, only).apply();
    }

    /** Version of the APK whose models are installed; null before the first installation. */
    String bundledVersion() {
        return values.getString(BUNDLED, null);
    }

    void setBundledVersion(String version) {
        values.edit().putString(BUNDLED, version).apply();
    }

    /** Whether the NPU was being started when the process ended. */
    boolean isNpuStarting() {
        return values.getBoolean(NPU_STARTING, false);
    }

    /** Written to the disk before it returns: the next call may crash the process. */
    void setNpuStarting(boolean starting) {
        values.edit().putBoolean(NPU_STARTING, starting).commit();
    }

    /** Whether the person was asked to allow notifications. */
    boolean askedToNotify() {
        return values.getBoolean(ASKED_TO_NOTIFY, false);
    }

    void setAskedToNotify() {
        values.edit().putBoolean(ASKED_TO_NOTIFY, true).apply();
    }

    void clear() {
        values.edit().clear().commit();
    }
}
