package dev.mobilevd.core;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.LinkedHashMap;
import java.util.Map;

/**
 * A file that says which native call is running, so that a crash that takes the whole process, or the whole phone, can
 * be named at the next start. Nothing running: no file.
 */
public final class RunTrace {
    private final Path file;

    /**
     * A call that began.
     *
     * @param artifact its name
     * @param part counted from 1, of {@code parts}
     * @param stage "load", "warmup", "run" or "close"
     */
    public record Step(String artifact, String component, int part, int parts, String backend, String stage) {}

    /** A trace in {@code file}, whose folder exists. */
    public RunTrace(Path file) {
        this.file = file;
    }

    /**
     * What was running when the process ended the last time, and forget it. It crashed there, or was killed there: the
     * system, or the person who swiped it away, may know more.
     *
     * @return null if nothing was running
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
            return null; // there is none, or it is no trace of this version
        } finally {
            clear();
        }
    }

    /** Write down, to the disk itself, that a call begins. Throws {@link Problem#NOT_WRITTEN}. */
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
            // The worst that follows is a report of a crash that was none.
        }
    }
}
