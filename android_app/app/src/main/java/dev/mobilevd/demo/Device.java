package dev.mobilevd.demo;

import android.app.ActivityManager;
import android.content.Context;
import android.content.pm.PackageInfo;
import android.content.pm.PackageManager;
import android.os.Build;
import android.os.PowerManager;
import android.system.ErrnoException;
import android.system.Os;
import dev.mobilevd.core.ArtifactStore;
import dev.mobilevd.core.Benchmark;
import dev.mobilevd.core.CpuRuntime;
import dev.mobilevd.core.MemoryInfo;
import dev.mobilevd.core.MobileVdException;
import dev.mobilevd.core.NpuRuntime;
import dev.mobilevd.core.Problem;
import dev.mobilevd.core.RunTrace;
import dev.mobilevd.core.Runtimes;
import dev.mobilevd.core.SdkVersion;
import java.io.File;
import java.nio.file.Files;
import java.nio.file.Path;

/** What the core wants to know of this phone, asked of Android. */
class Device {
    static final String PLUGIN = "libonnxruntime_providers_qnn.so";
    private static final String BACKEND = "libQnnHtp.so";
    private static final String STARTING = "npu_starting";

    private final Context context;
    private Runtimes runtimes;

    Device(Context context) {
        this.context = context;
    }

    /** Where artifacts are; adb's shell may write there, other apps may not. */
    ArtifactStore store() {
        return new ArtifactStore(files("artifacts"), folder -> freeBytes());
    }

    /** How much may still be written where artifacts are, and clips. */
    long freeBytes() {
        return files("artifacts").toFile().getUsableSpace();
    }

    /** Where benchmarks leave their results, for adb to fetch. */
    Path benchmarks() {
        return files("benchmarks");
    }

    private Path files(String name) {
        File external = context.getExternalFilesDir(name);
        return (external != null ? external : new File(context.getFilesDir(), name)).toPath();
    }

    /** What was running natively; of all screens, because there is one process. */
    RunTrace trace() {
        return new RunTrace(context.getNoBackupFilesDir().toPath().resolve("running.json"));
    }

    /** Whether this version of the app holds the NPU's libraries. */
    boolean hasNpuLibraries() {
        return Files.exists(library(PLUGIN));
    }

    private Path library(String name) {
        return new File(context.getApplicationInfo().nativeLibraryDir, name).toPath();
    }

    /** Whether the process ended the last time while it started the NPU; asked once. */
    boolean endedInStart() {
        var settings = Settings.of(context);
        boolean ended = settings.getBoolean(STARTING, false);
        settings.edit().remove(STARTING).apply();
        return ended;
    }

    /** Start what this device can run on. Slow the first time; any one thread. */
    synchronized Runtimes runtimes() {
        if (runtimes == null) {
            CpuRuntime cpu = new CpuRuntime(context.getCacheDir().toPath());
            try {
                runtimes = Runtimes.of(cpu, startNpu());
            } catch (MobileVdException problem) {
                runtimes = Runtimes.withoutNpu(cpu, problem);
            }
        }
        return runtimes;
    }

    private NpuRuntime startNpu() throws MobileVdException {
        if (!hasNpuLibraries()) {
            throw new MobileVdException(Problem.NPU_NOT_IN_APP, PLUGIN);
        }
        SdkVersion sdk = SdkVersion.ofLibrary(library(BACKEND));
        if (sdk == null || soc() == null) {
            String missing = sdk == null ? BACKEND + " names no version" : "the system names no chip";
            throw new MobileVdException(Problem.NPU_LIBRARY_FAILS, missing);
        }
        String libraries = context.getApplicationInfo().nativeLibraryDir;
        try {
            // The DSP opens its skeleton by this path; it must be set before the first call.
            Os.setenv("ADSP_LIBRARY_PATH", libraries + ";/vendor/lib/rfsa/adsp;/system/lib/rfsa/adsp", true);
        } catch (ErrnoException error) {
            throw new MobileVdException(error, Problem.NPU_LIBRARY_FAILS, error.toString());
        }
        // Drivers have been seen to crash here; the next start then says so.
        var settings = Settings.of(context);
        settings.edit().putBoolean(STARTING, true).commit();
        try {
            Path scratch = context.getCacheDir().toPath();
            return NpuRuntime.start(
                    new NpuRuntime.Settings(
                            library(PLUGIN).toString(), library(BACKEND).toString(), soc(), sdk, scratch));
        } finally {
            settings.edit().remove(STARTING).commit();
        }
    }

    /** Memory that can be had before Android begins to close apps. */
    MemoryInfo memory() {
        ActivityManager manager = context.getSystemService(ActivityManager.class);
        return () -> {
            ActivityManager.MemoryInfo info = new ActivityManager.MemoryInfo();
            manager.getMemoryInfo(info);
            return new MemoryInfo.Snapshot(Math.max(info.availMem - info.threshold, 0), info.totalMem);
        };
    }

    /** What a benchmark says of where it ran. */
    Benchmark.Device describe() {
        return new Benchmark.Device(
                Build.MANUFACTURER, Build.MODEL, soc(), Build.VERSION.RELEASE, Build.VERSION.SDK_INT,
                packageInfo().versionName,
                memory(), this::thermal);
    }

    /** When this version of the app came here. */
    long lastUpdate() {
        return packageInfo().lastUpdateTime;
    }

    private PackageInfo packageInfo() {
        try {
            return context.getPackageManager().getPackageInfo(context.getPackageName(), 0);
        } catch (PackageManager.NameNotFoundException error) {
            throw new IllegalStateException(error); // we run, so we are installed
        }
    }

    /** Part number of the chip; null before Android 12. */
    private static String soc() {
        if (Build.VERSION.SDK_INT < 31 || Build.SOC_MODEL.equals(Build.UNKNOWN)) {
            return null;
        }
        return Build.SOC_MODEL;
    }

    /** Android's name of the thermal status; null before Android 10. */
    private String thermal() {
        if (Build.VERSION.SDK_INT < 29) {
            return null;
        }
        String[] names = {"none", "light", "moderate", "severe", "critical", "emergency", "shutdown"};
        int status = context.getSystemService(PowerManager.class).getCurrentThermalStatus();
        return status >= 0 && status < names.length ? names[status] : null;
    }
}
