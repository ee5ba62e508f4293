package dev.mobilevd.core;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collection;
import java.util.HashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;

/**
 * Generates a clip from a picture: runs an artifact's components in the order of its manifest.
 *
 * <p>One session is in memory at a time; a value is freed after its last use. Not thread-safe.
 */
public final class Pipeline {
    private final Artifact artifact;
    private final Runtimes runtimes;
    private final MemoryInfo memory;
    private final RunTrace trace;
    private final Map<String, Double> measuredMs;

    /** Stages of a component's run. */
    public enum Stage {
        /** Checking digests, then creating the session. */
        LOAD,
        /** Calls that are not measured. */
        WARMUP,
        /** Calls that are measured. */
        RUN,
        /** Freeing the session. */
        CLOSE;

        /** Its name in benchmark files and traces: "load", "warmup", "run" or "close". */
        public String id() {
            return name().toLowerCase(Locale.ROOT);
        }
    }

    /** Receives the progress of a run, on the run's thread. */
    public interface Listener {
        /** Ignores everything. */
        Listener NONE = new Listener() {};

        /**
         * A stage, or a call of it, begins.
         *
         * @param index of the component, from 0, of {@code count}
         * @param call from 1, in stages WARMUP and RUN; else 0
         * @param fraction done of the whole run: in [0, 1], never decreasing
         */
        default void at(String component, int index, int count, Backend backend, Stage stage, int call,
                double fraction) {}

        /** A component is done. */
        default void finished(ComponentRun run) {}
    }

    /** {@code trace} is written before each native call. */
    public Pipeline(Artifact artifact, Runtimes runtimes, MemoryInfo memory, RunTrace trace) {
        this(artifact, runtimes, memory, trace, Map.of());
    }

    /**
     * The same, with progress by measured times.
     *
     * @param measuredMs times of an earlier run by component, in ms; used if they contain every component
     */
    public Pipeline(
            Artifact artifact, Runtimes runtimes, MemoryInfo memory, RunTrace trace, Map<String, Double> measuredMs) {
        this.artifact = artifact;
        this.measuredMs = measuredMs;
        this.runtimes = runtimes;
        this.memory = memory;
        this.trace = trace;
    }

    /**
     * Generate a clip.
     *
     * @param image (1, 3, height, width) in [-1, 1]: {@link ImagePrep#prepare}
     * @param seed any 64 bits, unsigned; the same seed gives the same noise on every machine
     * @throws MobileVdException {@link Problem#IMAGE_INVALID}, {@link Problem#NO_MEMORY} before anything is loaded,
     *     {@link Problem#CANCELLED}, and the problems of {@link ComponentRuntime} and {@link Runner}; with
     *     {@link Runtimes.Asked#AUTO}, a component runs on the CPU after an NPU_ problem, and after two failures on the
     *     NPU
     */
    public Clip generate(
            float[] image, long seed, Runtimes.Asked asked, Listener listener, Cancellation cancellation)
            throws MobileVdException {
        return run(new Request(image, seed, asked, 0, 1, null), listener, cancellation);
    }

    /**
     * A run, and how often to repeat its components.
     *
     * @param measured components to warm up and repeat; the others run once; null: all
     */
    record Request(
            float[] image, long seed, Runtimes.Asked asked, int warmup, int samples, Set<String> measured) {
        boolean measures(String component) {
            return measured == null || measured.contains(component);
        }
    }

    Clip run(Request request, Listener listener, Cancellation cancellation) throws MobileVdException {
        checkImage(request.image());
        checkMemory(request.asked());
        return new Run(request, listener, cancellation).all();
    }

    private void checkImage(float[] image) throws MobileVdException {
        Manifest.PipelineSpec spec = artifact.manifest().pipeline();
        if (image.length != 3L * spec.height() * spec.width()) {
            throw new MobileVdException(
                    Problem.IMAGE_INVALID,
                    image.length + " values are not 3 x " + spec.height() + " x " + spec.width());
        }
        for (float value : image) {
            if (!(value >= -1 && value <= 1)) {
                throw new MobileVdException(Problem.IMAGE_INVALID, "a value is " + value + ", not in [-1, 1]");
            }
        }
    }

    private void checkMemory(Runtimes.Asked asked) throws MobileVdException {
        for (Manifest.Component component : artifact.manifest().components()) {
            ComponentRuntime runtime = runtimes.choose(component, asked).runtime();
            for (Manifest.Part part : runtime.parts(component)) {
                checkMemory(component, runtime, part);
            }
        }
    }

    private void checkMemory(Manifest.Component component, ComponentRuntime runtime, Manifest.Part part)
            throws MobileVdException {
        long needed = runtime.memoryBytes(part);
        long available = memory.read().availableBytes();
        if (needed > available) {
            throw new MobileVdException(
                    Problem.NO_MEMORY, component.name(), new ByteSize(needed), new ByteSize(available));
        }
    }

    /** One run, with its live values. */
    private final class Run {
        private final Request request;
        private final Listener listener;
        private final Cancellation cancellation;
        private final List<Manifest.Component> components = artifact.manifest().components();
        private final List<ComponentRun> runs = new ArrayList<>();
        /** Live values by source: "image" or "component:NAME". */
        private final Map<String, Tensor> values = new HashMap<>();
        /** The highest progress so far: a component may run more than once. */
        private double reached;

        Run(Request request, Listener listener, Cancellation cancellation) {
            this.request = request;
            this.listener = listener;
            this.cancellation = cancellation;
        }

        Clip all() throws MobileVdException {
            Manifest.PipelineSpec spec = artifact.manifest().pipeline();
            try {
                values.put("image", Tensor.of(request.image(), 1, 3, spec.height(), spec.width()));
                for (int index = 0; index < components.size(); index++) {
                    runComponent(index);
                    dropRead(index);
                }
                String last = "component:" + components.get(components.size() - 1).name();
                return new Clip(values.get(last).toArray(), spec, List.copyOf(runs));
            } finally {
                close(values.values());
            }
        }

        private void runComponent(int index) throws MobileVdException {
            Manifest.Component component = components.get(index);
            Map<String, Tensor> inputs = new HashMap<>();
            List<Tensor> noises = new ArrayList<>();
            try {
                for (Manifest.TensorSpec input : component.inputs()) {
                    Tensor value = values.get(input.source());
                    if (value == null) {
                        value = noise(input);
                        noises.add(value);
                    }
                    inputs.put(input.name(), value);
                }
                values.put("component:" + component.name(), runAnywhere(index, inputs));
            } catch (OutOfMemoryError error) {
                throw new MobileVdException(error, Problem.MEMORY_RAN_OUT, component.name());
            } finally {
                close(noises);
            }
        }

        private Tensor noise(Manifest.TensorSpec input) {
            long stream = Long.parseLong(input.source().substring("noise:".length()));
            int count = Math.toIntExact(input.shape().stream().reduce(1L, Math::multiplyExact));
            return Tensor.of(Noise.unit(request.seed(), stream, count), input.dimensions());
        }

        private Tensor runAnywhere(int index, Map<String, Tensor> inputs) throws MobileVdException {
            Runtimes.Choice choice = runtimes.choose(components.get(index), request.asked());
            boolean mayFallBack =
                    request.asked() == Runtimes.Asked.AUTO && choice.runtime().backend() == Backend.NPU;
            if (!mayFallBack) {
                return new ComponentCall(index, choice, inputs).run();
            }
            MobileVdException failure = null;
            // A restart of the DSP breaks all sessions, so a failed call is repeated once in a new session. Source:
            // github.com/microsoft/onnxruntime/issues/20579.
            for (int attempt = 0; attempt < 2; attempt++) {
                try {
                    return new ComponentCall(index, choice, inputs).run();
                } catch (MobileVdException problem) {
                    failure = problem.onNpu();
                    if (!failure.problem().isNpu()) {
                        throw problem;
                    }
                    if (failure == problem) {
                        break; // another attempt would fail in the same way
                    }
                }
            }
            return new ComponentCall(index, runtimes.onCpu(failure), inputs).run();
        }

        /** Free values that no component after {@code index} reads, except the result. */
        private void dropRead(int index) {
            values.entrySet()
                    .removeIf(
                            value -> {
                                boolean kept =
                                        index == components.size() - 1
                                                || components.subList(index + 1, components.size()).stream()
                                                        .flatMap(component -> component.inputs().stream())
                                                        .anyMatch(input -> input.source().equals(value.getKey()));
                                if (!kept) {
                                    value.getValue().close();
                                }
                                return !kept;
                            });
        }

        /** All calls of one component on one backend. */
        private final class ComponentCall {
            private final int index;
            private final Manifest.Component component;
            private final Runtimes.Choice choice;
            private final ComponentRuntime runtime;
            private final Map<String, Tensor> inputs;
            private final int warmup;
            private final double[] ms;
            private double loadMs;
            private int npuNodes;
            private int cpuNodes;

            ComponentCall(int index, Runtimes.Choice choice, Map<String, Tensor> inputs) {
                this.index = index;
                this.choice = choice;
                this.inputs = inputs;
                component = components.get(index);
                runtime = choice.runtime();
                boolean measured = request.measures(component.name());
                warmup = measured ? request.warmup() : 0;
                ms = new double[measured ? request.samples() : 1];
            }

            Tensor run() throws MobileVdException {
                Map<String, Tensor> made = new HashMap<>();
                try (PeakMemory peak = new PeakMemory()) {
                    List<Manifest.Part> parts = runtime.parts(component);
                    for (int part = 0; part < parts.size(); part++) {
                        runPart(parts, part, made);
                        dropRead(parts.subList(part + 1, parts.size()), made);
                    }
                    Tensor output = made.get(component.output().name());
                    checkOutput(output);
                    ComponentRun run =
                            new ComponentRun(
                                    component.name(), runtime.backend(), npuNodes, cpuNodes, loadMs, msList(),
                                    peak.bytes(), choice.whyNotNpu());
                    runs.add(run);
                    listener.finished(run);
                    made.remove(component.output().name());
                    return output;
                } finally {
                    close(made.values());
                }
            }

            private void runPart(List<Manifest.Part> parts, int number, Map<String, Tensor> made)
                    throws MobileVdException {
                Manifest.Part part = parts.get(number);
                Map<String, Tensor> feeds = new HashMap<>();
                for (String name : part.inputs()) {
                    feeds.put(name, made.containsKey(name) ? made.get(name) : inputs.get(name));
                }
                try {
                    begin(parts, number, Stage.LOAD, 0);
                    checkMemory(component, runtime, part);
                    artifact.verify(part.files().values(), Progress.NONE, cancellation);
                    long begun = System.nanoTime();
                    try (Runner runner = runtime.load(artifact, component, part)) {
                        loadMs += since(begun);
                        callAll(parts, number, runner, feeds, made);
                        begin(parts, number, Stage.CLOSE, 0);
                    }
                } finally {
                    trace.clear();
                }
            }

            private void callAll(
                    List<Manifest.Part> parts, int number, Runner runner, Map<String, Tensor> feeds,
                    Map<String, Tensor> made)
                    throws MobileVdException {
                int calls = warmup + ms.length;
                for (int call = 0; call < calls; call++) {
                    boolean measured = call >= warmup;
                    int sample = measured ? call - warmup : call;
                    begin(parts, number, measured ? Stage.RUN : Stage.WARMUP, sample + 1);
                    long begun = System.nanoTime();
                    Map<String, Tensor> outputs = runner.run(feeds, cancellation);
                    double took = since(begun);
                    if (measured) {
                        ms[sample] += took;
                    }
                    keep(call == calls - 1 ? parts.get(number).outputs() : List.of(), outputs, made);
                }
                npuNodes += runner.placement().npuNodes();
                cpuNodes += runner.placement().cpuNodes();
            }

            private void begin(List<Manifest.Part> parts, int part, Stage stage, int call) throws MobileVdException {
                cancellation.check();
                if (call <= 1) { // writing takes milliseconds, in which the chip would cool down between measured calls
                    trace.begin(
                            new RunTrace.Step(
                                    artifact.root().getFileName().toString(), component.name(), part + 1,
                                    parts.size(), runtime.backend().id(), stage.id()));
                }
                int calls = warmup + ms.length;
                int done = stage == Stage.LOAD ? 0 : stage == Stage.CLOSE ? calls : call - 1;
                if (stage == Stage.RUN) {
                    done += warmup;
                }
                reached = Math.max(reached, fraction((part + (double) done / calls) / parts.size()));
                listener.at(
                        component.name(), index, components.size(), runtime.backend(), stage, call, reached);
            }

            private double fraction(double ofComponent) {
                double before = 0;
                double total = 0;
                for (int i = 0; i < components.size(); i++) {
                    double weight = weight(components.get(i));
                    total += weight;
                    before += i < index ? weight : i == index ? weight * ofComponent : 0;
                }
                return before / total;
            }

            /** Move the listed outputs of a call to {@code made}; close the others. */
            private void keep(List<String> names, Map<String, Tensor> outputs, Map<String, Tensor> made)
                    throws MobileVdException {
                Map<String, Tensor> left = new HashMap<>(outputs);
                try {
                    for (String name : names) {
                        if (!left.containsKey(name)) {
                            throw new MobileVdException(
                                    Problem.OUTPUT_UNEXPECTED, component.name(), outputs.toString(), name);
                        }
                        made.put(name, left.remove(name));
                    }
                } finally {
                    close(left.values());
                }
            }

            private void dropRead(List<Manifest.Part> later, Map<String, Tensor> made) {
                made.entrySet()
                        .removeIf(
                                value -> {
                                    String name = value.getKey();
                                    boolean kept =
                                            name.equals(component.output().name())
                                                    || later.stream().anyMatch(part -> part.inputs().contains(name));
                                    if (!kept) {
                                        value.getValue().close();
                                    }
                                    return !kept;
                                });
            }

            private void checkOutput(Tensor output) throws MobileVdException {
                long[] expected = component.output().dimensions();
                if (!Arrays.equals(output.shape(), expected)) {
                    throw new MobileVdException(
                            Problem.OUTPUT_UNEXPECTED, component.name(), output.toString(), Arrays.toString(expected));
                }
                if (!output.isFinite()) {
                    throw new MobileVdException(Problem.OUTPUT_NOT_FINITE, component.name());
                }
            }

            private List<Double> msList() {
                List<Double> values = new ArrayList<>();
                for (double value : ms) {
                    values.add(value);
                }
                return List.copyOf(values);
            }
        }
    }

    /** The share of a component in the run's time. Without times it is half by FLOPs, half equal, for the loading. */
    private double weight(Manifest.Component component) {
        List<Manifest.Component> all = artifact.manifest().components();
        if (all.stream().allMatch(each -> measuredMs.getOrDefault(each.name(), 0.0) > 0)) {
            return measuredMs.get(component.name());
        }
        double flops = all.stream().mapToDouble(each -> Math.max(each.flops(), 1)).sum();
        return Math.max(component.flops(), 1) / flops + 1.0 / all.size();
    }

    private static double since(long begun) {
        return (System.nanoTime() - begun) / 1e6;
    }

    private static void close(Collection<Tensor> tensors) {
        tensors.forEach(Tensor::close);
    }
}
