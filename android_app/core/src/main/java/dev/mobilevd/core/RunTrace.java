package dev.mobilevd.core;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.LinkedHashMap;
import java.util.Map;

/**
 * A file that names the native call in progress. After a crash of the process or the phone, the next start reads it.
 * While no call is in progress, the file does not exist.
 */
public final class RunTrace {
    private final Path file;

    /**
     * A native call.
     *
     * @param artifact name of the artifact
     * @param part counted from 1, of {@code parts}
     * @param stage "load", "warmup", "run" or "close"
     */
    public record Step(String artifact, String component, int part, int parts, String backend, String stage) {}

    /** A trace in {@code file}. Its folder must exist. */
    public RunTrace(Path file) {
        this.file = file;
    }

    /**
     * Return and delete the call that was in progress when the previous process ended. It crashed, or the system or the
     * person ended it.
     *
     * @return null if no call was in progress
     */
    public Step takePrevious() {
        try {
            Map<String, Object> fields = Json.readObject(Files.readAllBytes(file));
            return new Step(
                    (String) fields.get("artifact"),
                    (String) fields.get("component"),
                    Math.toIntExact((Long) fields.get("part")),
                    Math.toIntExact((Long) fields.get("parts")),
                    (String) fields.get("backend"),
                    (String) fields.get("stage"));
        } catch (IOException | Json.Refused | ClassCastException | NullPointerException | ArithmeticException error) {
            return null; // no file, or one of another version
        } finally {
            clear();
        }
    }

    /** Write to the disk that a call begins. Throws {@link Problem#NOT_WRITTEN}. */
    void begin(Step step) throws MobileVdException {
        Map<String, Object> fields = new LinkedHashMap<>();
        fields.put("artifact", step.artifact());
        fields.put("component", step.component());
        fields.put("part", step.part());
        fields.put("parts", step.parts());
        fields.put("backend", step.backend());
        fields.put("stage", step.stage());
        DurableFile.write(file, Json.write(fields));
    }

    /** The call returned. */
    void clear() {
        try {
            Files.deleteIfExists(file);
        } catch (IOException error) {
            // The next start then reports a crash that did not happen.
        }
    }
}
