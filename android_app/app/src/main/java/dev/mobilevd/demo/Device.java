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

/** The phone: its folders, runtimes, memory and identity. */
class Device {
    static final String PLUGIN = "libonnxruntime_providers_qnn.so";
    private static final String BACKEND = "libQnnHtp.so";

    private final Context context;
    private Runtimes runtimes;

    Device(Context context) {
        this.context = context;
    }

    /**
     * The folder of artifacts. adb's shell may write there. Other apps may not, except on Android 9 and 10, where those
     * with the storage permission may read and write it.
     */
    ArtifactStore store() {
        return new ArtifactStore(files("artifacts"), folder -> freeBytes());
    }

    /** Free space for artifacts and clips. */
    long freeBytes() {
        return files("artifacts").toFile().getUsableSpace();
    }

    /** The folder of benchmark results, which adb reads. */
    Path benchmarks() {
        return files("benchmarks");
    }

    private Path files(String name) {
        File external = context.getExternalFilesDir(name);
        return (external != null ? external : new File(context.getFilesDir(), name)).toPath();
    }

    /** The trace of native calls. All screens share it. */
    RunTrace trace() {
        return new RunTrace(context.getNoBackupFilesDir().toPath().resolve("running.json"));
    }

    /** Whether this app contains the NPU's libraries. */
    boolean hasNpuLibraries() {
        return Files.exists(library(PLUGIN));
    }

    /** The lowest version of the QNN libraries; null if none contains a version. All of them must fit a binary. */
    SdkVersion oldestSdk() throws MobileVdException {
        File[] libraries =
                new File(context.getApplicationInfo().nativeLibraryDir)
                        .listFiles((folder, name) -> name.matches("libQnn.*\\.so"));
        SdkVersion oldest = null;
        for (File file : libraries == null ? new File[0] : libraries) {
            SdkVersion version = SdkVersion.ofLibrary(file.toPath());
            if (version != null && (oldest == null || version.isOlderThan(oldest))) {
                oldest = version;
            }
        }
        return oldest;
    }

    private Path library(String name) {
        return new File(context.getApplicationInfo().nativeLibraryDir, name).toPath();
    }

    /** Return and reset whether the previous process ended while it started the NPU. */
    boolean endedInStart() {
        Settings settings = new Settings(context);
        boolean ended = settings.isNpuStarting();
        settings.setNpuStarting(false);
        return ended;
    }

    /** The runtimes. The first call starts them, which is slow. Any thread. */
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
            throw new MobileVdException(Problem.NPU_NOT_IN_APP);
        }
        SdkVersion sdk = oldestSdk();
        if (sdk == null || soc() == null) {
            String missing = sdk == null ? BACKEND + " contains no version" : "the system reports no chip";
            throw new MobileVdException(Problem.NPU_LIBRARY_FAILS, missing);
        }
        String libraries = context.getApplicationInfo().nativeLibraryDir;
        try {
            // The DSP searches its skeleton here. It must be set before the first call.
            Os.setenv("ADSP_LIBRARY_PATH", libraries + ";/vendor/lib/rfsa/adsp;/system/lib/rfsa/adsp", true);
        } catch (ErrnoException error) {
            throw new MobileVdException(error, Problem.NPU_LIBRARY_FAILS, error.toString());
        }
        // Drivers are known to crash here. The next start reports it.
        Settings settings = new Settings(context);
        settings.setNpuStarting(true);
        try {
            Path scratch = context.getCacheDir().toPath();
            return NpuRuntime.start(
                    new NpuRuntime.Settings(
                            library(PLUGIN).toString(), library(BACKEND).toString(), soc(), sdk, scratch));
        } finally {
            settings.setNpuStarting(false);
        }
    }

    /** Start the service that keeps a run alive in the background; returns false if the system does not allow it. */
    boolean startRunService() {
        return RunService.start(context);
    }

    /** Memory that is available before Android closes apps. */
    MemoryInfo memory() {
        ActivityManager manager = context.getSystemService(ActivityManager.class);
        return () -> {
            ActivityManager.MemoryInfo info = new ActivityManager.MemoryInfo();
            manager.getMemoryInfo(info);
            return new MemoryInfo.Snapshot(Math.max(info.availMem - info.threshold, 0), info.totalMem);
        };
    }

    /** The device, as benchmark results describe it. */
    Benchmark.Device describe() {
        return new Benchmark.Device(
                Build.MANUFACTURER, Build.MODEL, soc(), Build.VERSION.RELEASE, Build.VERSION.SDK_INT,
                packageInfo().versionName,
                memory(), this::thermal);
    }

    /** Time of the installation of this version of the app. */
    long lastUpdate() {
        return packageInfo().lastUpdateTime;
    }

    private PackageInfo packageInfo() {
        try {
            return context.getPackageManager().getPackageInfo(context.getPackageName(), 0);
        } catch (PackageManager.NameNotFoundException error) {
            throw new IllegalStateException(error); // this app is installed
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
