package dev.mobilevd.core;

import java.util.ArrayList;
import java.util.Collection;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Set;
import java.util.regex.Pattern;

/**
 * The contents of an artifact and how to run them: manifest.json, schema version 1, as the Python package writes it.
 *
 * <p>Fields that a runner needs are read strictly. Of the fields about the export (recipe, passes, drift, ...) only
 * presence and type are checked.
 *
 * @param created UTC, "2025-01-31T12:00:00Z"
 * @param components in running order; the last one outputs the frames
 * @param files by role, those that belong to no component
 */
public record Manifest(
        String name, String created, List<Component> components, PipelineSpec pipeline, Map<String, FileEntry> files) {
    /** The schema version that this class reads. */
    public static final int SCHEMA_VERSION = 1;

    static final String FILE = "manifest.json";
    static final String DIGEST_FILE = "manifest.sha256";
    static final Pattern NAME = Pattern.compile("[A-Za-z0-9][A-Za-z0-9._-]*");

    // No segment may start with a dot, which excludes ".." and hidden files.
    private static final Pattern PATH = Pattern.compile(NAME + "(/" + NAME + ")*");
    private static final Pattern SHA256 = Pattern.compile("[0-9a-f]{64}");
    private static final Pattern SOURCE =
            Pattern.compile("image|noise:(0|[1-9][0-9]{0,8})|component:" + NAME);
    private static final Pattern CREATED =
            Pattern.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z");
    private static final Pattern LAYOUT = Pattern.compile("[NCHW]+");
    private static final Pattern DTYPE = Pattern.compile("float32|float16");
    private static final Pattern ANYTHING = Pattern.compile(".+", Pattern.DOTALL);

    /**
     * One input or output of a component.
     *
     * @param shape all axes at least 1
     * @param dtype "float32" or "float16"
     * @param layout one letter per axis: N (1, or the frames), C, H, W
     * @param source source of an input: "image", "noise:STREAM" or "component:NAME"; null for outputs
     */
    public record TensorSpec(String name, List<Long> shape, String dtype, String layout, String source) {
        long[] dimensions() {
            return shape.stream().mapToLong(Long::longValue).toArray();
        }

        private static TensorSpec read(Fields fields) throws MobileVdException {
            String name = fields.string("name", ANYTHING);
            List<Long> shape = new ArrayList<>();
            for (Object size : Fields.as(List.class, fields.at("shape"), fields.any("shape"))) {
                shape.add(Fields.integer(fields.at("shape"), size, 1));
            }
            String dtype = fields.string("dtype", DTYPE);
            String layout = fields.string("layout", LAYOUT);
            if (shape.size() != layout.length()) {
                throw Fields.invalid(fields.at("layout") + " does not name " + shape.size() + " axes");
            }
            fields.range("range");
            String source = null;
            if (fields.has("source")) {
                Object value = fields.any("source");
                if (value != null) {
                    source = Fields.as(String.class, fields.at("source"), value);
                    if (!SOURCE.matcher(source).matches()) {
                        throw Fields.invalid(fields.at("source") + ": \"" + source + "\" is not allowed");
                    }
                }
            }
            return new TensorSpec(name, List.copyOf(shape), dtype, layout, source);
        }
    }

    /**
     * A file of the artifact.
     *
     * @param path relative to the artifact's folder, with forward slashes; no segment begins with a dot
     * @param sha256 in lower-case hex
     */
    public record FileEntry(String path, String sha256, long bytes) {
        private static FileEntry read(Fields fields) throws MobileVdException {
            String path = fields.string("path", PATH);
            if (path.equals(FILE) || path.equals(DIGEST_FILE)) {
                throw Fields.invalid(fields.at("path") + ": " + path + " cannot list itself");
            }
            return new FileEntry(path, fields.string("sha256", SHA256), fields.integer("bytes", 0));
        }
    }

    /**
     * The model of one session: a whole component, or a part of one that was split to fit the NPU.
     *
     * @param files by role: "wrapper" and "context" for the NPU; "model", and "data" for external weights, for the CPU
     * @param inputs names: inputs of the component, or outputs of earlier parts
     * @param outputs names; all values between parts are float32
     */
    public record Part(Map<String, FileEntry> files, List<String> inputs, List<String> outputs) {
        /** Total size of its files. */
        public long bytes() {
            return files.values().stream().mapToLong(FileEntry::bytes).sum();
        }

        private static Part read(Fields fields) throws MobileVdException {
            Map<String, FileEntry> files = fields.map("files", FileEntry::read);
            if (!files.keySet().equals(Set.of("wrapper", "context"))) {
                throw Fields.invalid(fields.at("files") + " must be wrapper and context");
            }
            for (String unused : List.of("dram_read", "dram_written")) {
                if (fields.has(unused)) {
                    fields.any(unused);
                }
            }
            return new Part(files, fields.strings("inputs"), fields.strings("outputs"));
        }
    }

    /**
     * A component compiled for one chip.
     *
     * @param target part number, such as "SM8650"
     * @param arch version of its Hexagon, such as 75
     * @param precision such as "float16" or "w8a16"
     * @param qnnApi QNN API version of the compiler
     * @param sdk QAIRT version of the compiler; an older runtime cannot load the binary
     * @param parts in running order; the last one has the component's output
     */
    public record NpuBinary(
            String target, int arch, String precision, String qnnApi, SdkVersion sdk, List<Part> parts) {
        private static NpuBinary read(Fields fields) throws MobileVdException {
            return new NpuBinary(
                    fields.string("target", NAME),
                    fields.smallInteger("arch", 0),
                    fields.string("precision"),
                    fields.string("qnn_api"),
                    SdkVersion.parse(fields.string("sdk", SdkVersion.PATTERN)),
                    fields.list("parts", Part::read));
        }
    }

    /**
     * One network of the pipeline.
     *
     * @param files by role: "model", and "data" for external weights; other roles are ignored
     * @param outputs exactly one
     * @param flops 2 x MAC for one call
     * @param npu binaries, one per target
     */
    public record Component(
            String name,
            Map<String, FileEntry> files,
            List<TensorSpec> inputs,
            List<TensorSpec> outputs,
            long parameters,
            long flops,
            List<NpuBinary> npu) {
        /** Its only output. */
        public TensorSpec output() {
            return outputs.get(0);
        }

        /** All files of the component. */
        public List<FileEntry> allFiles() {
            List<FileEntry> all = new ArrayList<>(files.values());
            npu.forEach(binary -> binary.parts().forEach(part -> all.addAll(part.files().values())));
            return all;
        }

        private static Component read(Fields fields) throws MobileVdException {
            String name = fields.string("name", NAME);
            fields.string("kind", Pattern.compile("onnx"));
            Component component =
                    new Component(
                            name,
                            fields.map("files", FileEntry::read),
                            fields.list("inputs", TensorSpec::read),
                            fields.list("outputs", TensorSpec::read),
                            fields.integer("parameters", 0),
                            fields.integer("flops", 0),
                            fields.has("npu") ? fields.list("npu", NpuBinary::read) : List.of());
            fields.skip("ops", Map.class);
            component.check();
            return component;
        }

        private void check() throws MobileVdException {
            String where = "component " + name + ": ";
            if (!files.containsKey("model")) {
                throw Fields.invalid(where + "no file has the role \"model\"");
            }
            if (inputs.isEmpty() || outputs.size() != 1) {
                throw Fields.invalid(where + "it needs inputs, and one output");
            }
            Set<String> names = new HashSet<>();
            for (TensorSpec input : inputs) {
                if (input.source() == null) {
                    throw Fields.invalid(where + "no source for input " + input.name());
                }
                unique(names, input.name(), where + "input");
            }
            if (output().source() != null) {
                throw Fields.invalid(where + "output " + output().name() + " has a source");
            }
            Set<String> targets = new HashSet<>();
            for (NpuBinary binary : npu) {
                unique(targets, binary.target(), where + "npu target");
                checkParts(binary, where + "npu " + binary.target() + ": ");
            }
        }

        private void checkParts(NpuBinary binary, String where) throws MobileVdException {
            Set<String> known = new HashSet<>();
            inputs.forEach(input -> known.add(input.name()));
            List<String> last = List.of();
            for (Part part : binary.parts()) {
                if (part.inputs().isEmpty() || part.outputs().isEmpty()) {
                    throw Fields.invalid(where + "a part needs inputs and outputs");
                }
                for (String input : part.inputs()) {
                    if (!known.contains(input)) {
                        throw Fields.invalid(where + "no source for " + input);
                    }
                }
                for (String output : part.outputs()) {
                    unique(known, output, where + "value");
                }
                last = part.outputs();
            }
            if (!last.contains(output().name())) {
                throw Fields.invalid(where + "its last part does not output " + output().name());
            }
        }
    }

    /**
     * The formats of picture and frames. {@link ImagePrep} and {@link Noise} implement the only resize, crop, range and
     * noise generator of schema version 1.
     *
     * @param fps frames per second of the clip
     */
    public record PipelineSpec(int frames, int height, int width, int fps) {
        List<Long> imageShape() {
            return List.of(1L, 3L, (long) height, (long) width);
        }

        List<Long> framesShape() {
            return List.of((long) frames, 3L, (long) height, (long) width);
        }

        private static PipelineSpec read(Fields fields) throws MobileVdException {
            fields.only("noise", Noise.GENERATOR);
            fields.only("image_layout", "NCHW");
            fields.only("resize", "cover");
            fields.only("crop", "centre");
            fields.only("resample", "lanczos3");
            if (fields.has("image_range") && !List.of(-1.0, 1.0).equals(fields.range("image_range"))) {
                throw Fields.invalid(fields.at("image_range") + " is not [-1, 1]");
            }
            return new PipelineSpec(
                    fields.smallInteger("frames", 1),
                    fields.smallInteger("height", 1),
                    fields.smallInteger("width", 1),
                    fields.smallInteger("fps", 1));
        }
    }

    /**
     * Read the text of manifest.json.
     *
     * @throws MobileVdException {@link Problem#MANIFEST_UNREADABLE} for text that is not strict JSON or not a manifest,
     *     {@link Problem#MANIFEST_VERSION} for another schema version, {@link Problem#MANIFEST_INVALID} for an unknown
     *     or missing field, or for values that contradict each other
     */
    public static Manifest read(byte[] text) throws MobileVdException {
        Map<String, Object> values;
        try {
            values = Json.readObject(text);
        } catch (Json.Refused error) {
            throw new MobileVdException(error, Problem.MANIFEST_UNREADABLE, error.getMessage());
        }
        Object version = values.get("schema_version");
        if (!(version instanceof Long number)) {
            throw new MobileVdException(Problem.MANIFEST_UNREADABLE, "it has no schema_version");
        }
        if (number != SCHEMA_VERSION) {
            throw new MobileVdException(Problem.MANIFEST_VERSION, number, (long) SCHEMA_VERSION);
        }
        return Fields.read("", values, Manifest::read);
    }

    /** The component of that name, or null. */
    public Component component(String name) {
        return components.stream().filter(c -> c.name().equals(name)).findFirst().orElse(null);
    }

    /** All files that the manifest lists. */
    public List<FileEntry> allFiles() {
        List<FileEntry> all = new ArrayList<>();
        components.forEach(component -> all.addAll(component.allFiles()));
        all.addAll(files.values());
        return all;
    }

    /** Total size of all listed files. */
    public long bytes() {
        return allFiles().stream().mapToLong(FileEntry::bytes).sum();
    }

    private static Manifest read(Fields fields) throws MobileVdException {
        fields.any("schema_version");
        for (String key : List.of("source", "recipe", "model", "drift", "tools", "stages")) {
            fields.skip(key, Map.class);
        }
        fields.skip("passes", List.class);
        if (fields.has("quality")) {
            Object quality = fields.any("quality");
            if (quality != null) {
                Fields.as(Map.class, fields.at("quality"), quality);
            }
        }
        Manifest manifest =
                new Manifest(
                        fields.string("name"),
                        fields.string("created", CREATED),
                        fields.list("components", Component::read),
                        Fields.read("pipeline", fields.any("pipeline"), PipelineSpec::read),
                        fields.has("files") ? fields.map("files", FileEntry::read) : Map.of());
        manifest.check();
        return manifest;
    }

    private void check() throws MobileVdException {
        if (components.isEmpty()) {
            throw Fields.invalid("there are no components");
        }
        Set<String> paths = new HashSet<>();
        for (FileEntry entry : allFiles()) {
            // Some file systems ignore case.
            unique(paths, entry.path().toLowerCase(Locale.ROOT), "file");
        }
        Map<String, Component> before = new HashMap<>();
        for (Component component : components) {
            for (TensorSpec input : component.inputs()) {
                checkSource("component " + component.name() + ": input " + input.name(), input, before);
            }
            if (before.put(component.name(), component) != null) {
                throw Fields.invalid("component \"" + component.name() + "\" is listed twice");
            }
        }
        if (!components.get(components.size() - 1).output().shape().equals(pipeline.framesShape())) {
            throw Fields.invalid("the last component does not output the frames: " + pipeline.framesShape());
        }
    }

    private void checkSource(String where, TensorSpec input, Map<String, Component> before) throws MobileVdException {
        if (input.source().equals("image") && !input.shape().equals(pipeline.imageShape())) {
            throw Fields.invalid(where + ": " + input.shape() + ", the image is " + pipeline.imageShape());
        }
        if (input.source().startsWith("component:")) {
            Component provider = before.get(input.source().substring("component:".length()));
            if (provider == null) {
                throw Fields.invalid(where + ": no earlier component is \"" + input.source() + "\"");
            }
            TensorSpec given = provider.output();
            if (!given.shape().equals(input.shape()) || !given.dtype().equals(input.dtype())) {
                throw Fields.invalid(where + ": shape or dtype differs from the output of \"" + input.source() + "\"");
            }
        }
    }

    private static void unique(Collection<String> seen, String name, String what) throws MobileVdException {
        if (!seen.add(name)) {
            throw Fields.invalid(what + " \"" + name + "\" is listed twice");
        }
    }
}
