package dev.mobilevd.core;

import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtEpDevice;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtHardwareDevice;
import ai.onnxruntime.OrtSession;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.TreeSet;

/**
 * Runs context binaries on the Hexagon NPU with onnxruntime-qnn's plugin, or on the NPU's simulator with the plugin for
 * Linux.
 *
 * <p>No node may run on the CPU: sessions are created without fallback, and after the first run the runtime's profile
 * must name the NPU for every node. Chip and SDK version are compared before anything is loaded, because the plugin
 * either fails with a bare number (5000, 5005, 1009) or does not check.
 */
public final class NpuRuntime implements ComponentRuntime {
    static final String PROVIDER = "QNNExecutionProvider";

    /**
     * The libraries and the chip.
     *
     * @param plugin path of libonnxruntime_providers_qnn.so, or its name if the system finds it
     * @param backend the same for libQnnHtp.so
     * @param soc part number of the chip, such as "SM8650" (Build.SOC_MODEL)
     * @param sdk version of the QNN libraries: {@link SdkVersion#ofLibrary}
     * @param scratch folder for temporary files, such as an app's cache
     */
    public record Settings(String plugin, String backend, String soc, SdkVersion sdk, Path scratch) {}

    /** Variants with the same NPU. Source: xororz/local-dream, Model.kt, chipsetModelSuffixes; its issue 29. */
    private static final Map<String, String> VARIANTS =
            Map.of("SM8550P", "SM8550", "SM8650P", "SM8650", "SM8750P", "SM8750", "SM8850P", "SM8850");

    /**
     * Highest clocks during a call, released after it. Source: ONNX Runtime, onnxruntime_run_options_config_keys.h;
     * without it the NPU runs at its default clocks (microsoft/onnxruntime#24417).
     */
    private static final Map<String, String> BURST =
            Map.of("qnn.htp_perf_mode", "burst", "qnn.htp_perf_mode_post_run", "low_power_saver");

    private final Settings settings;
    private final List<OrtEpDevice> devices;

    private NpuRuntime(Settings settings, List<OrtEpDevice> devices) {
        this.settings = settings;
        this.devices = devices;
    }

    /**
     * Load the plugin and find an NPU. The plugin stays loaded until the process ends.
     *
     * @throws MobileVdException {@link Problem#NPU_LIBRARY_FAILS}, {@link Problem#NPU_NOT_FOUND}
     */
    public static NpuRuntime start(Settings settings) throws MobileVdException {
        OrtEnvironment environment = OrtEnvironment.getEnvironment();
        try {
            if (devices(environment).isEmpty()) {
                environment.registerExecutionProviderLibrary(PROVIDER, settings.plugin());
            }
            List<OrtEpDevice> found = devices(environment);
            if (found.isEmpty()) {
                throw new MobileVdException(Problem.NPU_NOT_FOUND);
            }
            return new NpuRuntime(settings, found);
        } catch (OrtException error) {
            throw new MobileVdException(error, Problem.NPU_LIBRARY_FAILS, error.getMessage());
        }
    }

    /** Version of the QNN libraries. */
    public SdkVersion sdk() {
        return settings.sdk();
    }

    @Override
    public Backend backend() {
        return Backend.NPU;
    }

    /**
     * {@inheritDoc}
     *
     * @throws MobileVdException {@link Problem#NPU_NO_BINARY}, {@link Problem#NPU_OTHER_CHIP},
     *     {@link Problem#NPU_RUNTIME_OLD}
     */
    @Override
    public List<Manifest.Part> parts(Manifest.Component component) throws MobileVdException {
        TreeSet<String> targets = new TreeSet<>();
        for (Manifest.NpuBinary binary : component.npu()) {
            if (isChip(settings.soc(), binary.target())) {
                if (settings.sdk().isOlderThan(binary.sdk())) {
                    throw new MobileVdException(
                            Problem.NPU_RUNTIME_OLD,
                            component.name(),
                            binary.sdk().toString(),
                            settings.sdk().toString());
                }
                return binary.parts();
            }
            targets.add(binary.target());
        }
        if (targets.isEmpty()) {
            throw new MobileVdException(Problem.NPU_NO_BINARY, component.name());
        }
        throw new MobileVdException(
                Problem.NPU_OTHER_CHIP, component.name(), String.join(", ", targets), settings.soc());
    }

    /** Twice the context binary: on Android the plugin reads the file onto the heap, and QNN copies it. */
    @Override
    public long memoryBytes(Manifest.Part part) {
        return 2 * part.files().get("context").bytes();
    }

    @Override
    public Runner load(Artifact artifact, Manifest.Component component, Manifest.Part part)
            throws MobileVdException {
        try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
            options.addConfigEntry("session.disable_cpu_ep_fallback", "1");
            options.addExecutionProvider(devices, Map.of("backend_path", settings.backend()));
            Path wrapper = artifact.path(part.files().get("wrapper"));
            return OrtRunner.load(component.name(), Backend.NPU, wrapper, settings.scratch(), options, BURST);
        } catch (OrtException error) {
            throw new MobileVdException(error, Problem.NPU_LIBRARY_FAILS, error.getMessage());
        }
    }

    /** Whether a device's chip is the target: "SM8750-AC", "sm8750" and "SM8750P" are SM8750. */
    static boolean isChip(String soc, String target) {
        String chip = soc.trim().toUpperCase(Locale.ROOT);
        chip = VARIANTS.getOrDefault(chip, chip);
        String wanted = target.toUpperCase(Locale.ROOT);
        return chip.equals(wanted) || chip.startsWith(wanted + "-");
    }

    /** The plugin's first NPU; if it has none, its first device, which is the simulator. */
    private static List<OrtEpDevice> devices(OrtEnvironment environment) throws OrtException {
        List<OrtEpDevice> found = new ArrayList<>();
        for (OrtEpDevice device : environment.getEpDevices()) {
            if (device.getEpName().equals(PROVIDER)) {
                found.add(device);
            }
        }
        for (OrtEpDevice device : found) {
            if (device.getDevice().getType() == OrtHardwareDevice.OrtHardwareDeviceType.NPU) {
                return List.of(device);
            }
        }
        return found.isEmpty() ? found : List.of(found.get(0));
    }
}
