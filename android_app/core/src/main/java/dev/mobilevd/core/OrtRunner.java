package dev.mobilevd.core;

import ai.onnxruntime.NodeInfo;
import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OnnxTensorLike;
import ai.onnxruntime.OnnxValue;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtLoggingLevel;
import ai.onnxruntime.OrtSession;
import ai.onnxruntime.TensorInfo;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.util.HashMap;
import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;

/** A session of ONNX Runtime. The profile of its first run tells where each node ran. */
final class OrtRunner implements Runner {
    private final String component;
    private final Backend backend;
    private final OrtSession session;
    private final Map<String, String> runConfig;
    private Placement placement;

    private OrtRunner(String component, Backend backend, OrtSession session, Map<String, String> runConfig) {
        this.runConfig = runConfig;
        this.component = component;
        this.backend = backend;
        this.session = session;
    }

    /**
     * Load a model by its path, because it refers to other files in the same folder.
     *
     * @param scratch folder for the profile
     * @param options configured for the backend; the caller closes them
     * @param runConfig entries of the options of every call
     */
    static OrtRunner load(
            String component, Backend backend, Path model, Path scratch, OrtSession.SessionOptions options,
            Map<String, String> runConfig)
            throws MobileVdException {
        try {
            options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_FATAL); // errors are thrown too
            options.enableProfiling(scratch.resolve("profile").toString());
            return new OrtRunner(
                    component, backend, OrtEnvironment.getEnvironment().createSession(model.toString(), options),
                    runConfig);
        } catch (OrtException error) {
            throw failure(error, backend == Backend.NPU ? Problem.NPU_REFUSED : Problem.MODEL_REFUSED, component);
        }
    }

    @Override
    public Map<String, Tensor> run(Map<String, Tensor> inputs, Cancellation cancellation) throws MobileVdException {
        cancellation.check();
        Set<Tensor> converted = new HashSet<>();
        try (OrtSession.RunOptions options = new OrtSession.RunOptions()) {
            for (Map.Entry<String, String> entry : runConfig.entrySet()) {
                options.addRunConfigEntry(entry.getKey(), entry.getValue());
            }
            Map<String, OnnxTensorLike> feeds = new HashMap<>();
            for (Map.Entry<String, NodeInfo> input : session.getInputInfo().entrySet()) {
                Tensor given = inputs.get(input.getKey());
                if (given == null) {
                    throw new MobileVdException(
                            Problem.RUN_FAILED, component, "no value for its input " + input.getKey());
                }
                Tensor fitting = given.as(((TensorInfo) input.getValue().getInfo()).type);
                if (fitting != given) {
                    converted.add(fitting);
                }
                feeds.put(input.getKey(), fitting.value());
            }
            Map<String, Tensor> outputs = call(feeds, options, cancellation);
            try {
                checkPlacement();
            } catch (MobileVdException | OrtException error) {
                outputs.values().forEach(Tensor::close);
                throw error;
            }
            return outputs;
        } catch (OrtException error) {
            cancellation.check();
            throw failure(error, Problem.RUN_FAILED, component);
        } finally {
            converted.forEach(Tensor::close);
        }
    }

    @Override
    public Placement placement() {
        return placement;
    }

    @Override
    public void close() {
        try {
            if (placement == null) {
                delete(Paths.get(session.endProfiling()));
            }
            session.close();
        } catch (OrtException error) {
            throw new IllegalStateException(error); // only if the session is closed already
        }
    }

    private Map<String, Tensor> call(
            Map<String, OnnxTensorLike> feeds, OrtSession.RunOptions options, Cancellation cancellation)
            throws OrtException {
        cancellation.enter(() -> terminate(options));
        try {
            Map<String, Tensor> outputs = new LinkedHashMap<>();
            // The result is not closed, because its values are returned as tensors.
            for (Map.Entry<String, OnnxValue> output : session.run(feeds, options)) {
                outputs.put(output.getKey(), new Tensor((OnnxTensor) output.getValue()));
            }
            return outputs;
        } finally {
            cancellation.leave();
        }
    }

    private static void terminate(OrtSession.RunOptions options) {
        try {
            options.setTerminate(true);
        } catch (OrtException error) {
            throw new IllegalStateException(error); // only for closed options, which leave() prevents
        }
    }

    private void checkPlacement() throws OrtException, MobileVdException {
        if (placement == null) {
            placement = readProfile(Paths.get(session.endProfiling()));
        }
        if (backend == Backend.NPU && (placement.npuNodes() == 0 || placement.cpuNodes() > 0)) {
            throw new MobileVdException(
                    Problem.NPU_PLACEMENT, component, placement.npuNodes(), placement.cpuNodes());
        }
    }

    private Placement readProfile(Path file) throws MobileVdException {
        try {
            Set<Object> npu = new HashSet<>();
            Set<Object> cpu = new HashSet<>();
            for (Object event : (List<?>) Json.read(Files.readAllBytes(file))) {
                Map<?, ?> fields = (Map<?, ?>) event;
                if ("Node".equals(fields.get("cat"))) {
                    Object provider = ((Map<?, ?>) fields.get("args")).get("provider");
                    (NpuRuntime.PROVIDER.equals(provider) ? npu : cpu).add(fields.get("name"));
                }
            }
            return new Placement(npu.size(), cpu.size());
        } catch (IOException | Json.Refused | ClassCastException error) {
            throw new MobileVdException(
                    error, Problem.RUN_FAILED, component,
                    "the runtime's profile cannot be read: " + error.getMessage());
        } finally {
            delete(file);
        }
    }

    private static void delete(Path file) {
        try {
            Files.deleteIfExists(file);
        } catch (IOException error) {
            // The system empties this folder.
        }
    }

    private static MobileVdException failure(OrtException error, Problem problem, String component) {
        String said = String.valueOf(error.getMessage());
        if (said.contains("bad_alloc") || said.contains("allocate memory")) {
            return new MobileVdException(error, Problem.MEMORY_RAN_OUT, component);
        }
        return new MobileVdException(error, problem, component, said);
    }
}
