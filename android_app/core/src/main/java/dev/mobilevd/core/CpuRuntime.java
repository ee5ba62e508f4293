package dev.mobilevd.core;

import ai.onnxruntime.OrtSession;
import java.nio.file.Path;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.stream.Collectors;

/** Runs the float model of a component on ONNX Runtime's CPU kernels. */
public final class CpuRuntime implements ComponentRuntime {
    private final Path scratch;

    /** {@code scratch} is a folder for temporary files, such as an app's cache. */
    public CpuRuntime(Path scratch) {
        this.scratch = scratch;
    }

    @Override
    public Backend backend() {
        return Backend.CPU;
    }

    @Override
    public List<Manifest.Part> parts(Manifest.Component component) {
        Map<String, Manifest.FileEntry> files = new LinkedHashMap<>();
        for (String role : List.of("model", "data")) {
            if (component.files().containsKey(role)) {
                files.put(role, component.files().get(role));
            }
        }
        List<String> inputs =
                component.inputs().stream().map(Manifest.TensorSpec::name).collect(Collectors.toList());
        return List.of(new Manifest.Part(files, inputs, List.of(component.output().name())));
    }

    /** Twice the weights, because kernels keep packed copies. */
    @Override
    public long memoryBytes(Manifest.Part part) {
        return 2 * part.bytes();
    }

    @Override
    public Runner load(Artifact artifact, Manifest.Component component, Manifest.Part part)
            throws MobileVdException {
        try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
            Path model = artifact.path(part.files().get("model"));
            return OrtRunner.load(component.name(), Backend.CPU, model, scratch, options, Map.of());
        }
    }
}
