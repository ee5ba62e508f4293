package dev.mobilevd.demo;

import android.graphics.Bitmap;
import android.os.SystemClock;
import dev.mobilevd.core.ArtifactStore;
import dev.mobilevd.core.Backend;
import dev.mobilevd.core.Manifest;
import java.util.ArrayList;
import java.util.List;

/**
 * What the main screen shows. Immutable: {@link Studio} replaces it as a whole, on the main thread.
 *
 * @param modelName the chosen model; null if none was chosen
 * @param seed as typed; it may be invalid
 * @param picture preview of the chosen picture; null without one
 * @param result the last clip; the next one replaces it
 * @param showsClip whether the stage shows the clip; else the picture, which is newer
 * @param rows components of the current run, or of the last run if it failed
 * @param message null without one
 * @param offers files of other apps that wait for the answer whether to install them
 */
record State(
        List<ArtifactStore.Installed> models, String modelName, String seed, boolean cpuOnly, Bitmap picture,
        Result result, boolean showsClip, List<Row> rows, Message message,
        List<Incoming.Offer> offers, Job job) {
    /** Kinds of jobs. */
    enum Work {
        NONE,
        INSTALLING,
        RUNNING,
        SAVING
    }

    /**
     * The job in progress.
     *
     * @param begun uptime at its start, ms
     * @param fraction done, in [0, 1]
     * @param installing name of the model that is being installed; null until it is known
     */
    record Job(Work work, long begun, double fraction, String installing, boolean isCancelling) {
        static final Job NONE = new Job(Work.NONE, 0, 0, null, false);

        static Job of(Work work) {
            return new Job(work, SystemClock.uptimeMillis(), 0, null, false);
        }

        Job withFraction(double done) {
            return new Job(work, begun, done, installing, isCancelling);
        }

        Job withInstalling(String model) {
            return new Job(work, begun, fraction, model, isCancelling);
        }

        Job cancelling() {
            return new Job(work, begun, fraction, installing, true);
        }

        /** Milliseconds since its start. */
        long elapsed() {
            return SystemClock.uptimeMillis() - begun;
        }
    }

    /** Progress of one component in a run. */
    enum Phase {
        WAITING,
        LOADING,
        RUNNING,
        DONE,
        FAILED
    }

    /**
     * One component of a run.
     *
     * @param backend null while it waits
     * @param since uptime at the start of the phase, ms
     * @param ms duration of the run; 0 until it is done
     */
    record Row(String component, Phase phase, Backend backend, long since, double ms) {
        /** The pseudo-component with all time outside the components' runs. */
        static final String OTHER = "";

        static Row waiting(String component) {
            return new Row(component, Phase.WAITING, null, 0, 0);
        }
    }

    /** What a message offers besides closing it. */
    enum Action {
        NONE,
        USE_CPU,
        CANCEL_READING
    }

    /** A message to the person. An error stays until it is closed or the next job begins; a notice disappears. */
    record Message(Words text, boolean isError, Action action) {
        boolean disappears() {
            return !isError && action == Action.NONE;
        }

        static Message notice(Words text) {
            return new Message(text, false, Action.NONE);
        }

        static Message error(Words text) {
            return new Message(text, true, Action.NONE);
        }
    }

    State withModels(List<ArtifactStore.Installed> list) {
        return new State(list, modelName, seed, cpuOnly, picture, result, showsClip, rows, message, offers, job);
    }

    State withModelName(String name) {
        return new State(models, name, seed, cpuOnly, picture, result, showsClip, rows, message, offers, job);
    }

    State withSeed(String text) {
        return new State(models, modelName, text, cpuOnly, picture, result, showsClip, rows, message, offers, job);
    }

    State withCpuOnly(boolean only) {
        return new State(models, modelName, seed, only, picture, result, showsClip, rows, message, offers, job);
    }

    State withPicture(Bitmap preview) {
        return new State(models, modelName, seed, cpuOnly, preview, result, showsClip, rows, message, offers, job);
    }

    State withResult(Result clip) {
        return new State(models, modelName, seed, cpuOnly, picture, clip, clip != null, rows, message, offers, job);
    }

    State withClipShown(boolean shown) {
        return new State(models, modelName, seed, cpuOnly, picture, result, shown, rows, message, offers, job);
    }

    State withRows(List<Row> list) {
        return new State(
                models, modelName, seed, cpuOnly, picture, result, showsClip, List.copyOf(list), message, offers, job);
    }

    State withMessage(Message shown) {
        return new State(models, modelName, seed, cpuOnly, picture, result, showsClip, rows, shown, offers, job);
    }

    State withOffer(Incoming.Offer offer) {
        List<Incoming.Offer> more = new ArrayList<>(offers);
        more.add(offer);
        return withOffers(more);
    }

    State withoutOffer(Incoming.Offer offer) {
        List<Incoming.Offer> fewer = new ArrayList<>(offers);
        fewer.remove(offer);
        return withOffers(fewer);
    }

    private State withOffers(List<Incoming.Offer> list) {
        return new State(
                models, modelName, seed, cpuOnly, picture, result, showsClip, rows, message, List.copyOf(list), job);
    }

    State withJob(Job started) {
        return new State(models, modelName, seed, cpuOnly, picture, result, showsClip, rows, message, offers, started);
    }

    /** Replace the row of the same component. */
    State withRow(Row row) {
        List<Row> next = new ArrayList<>();
        rows.forEach(old -> next.add(old.component().equals(row.component()) ? row : old));
        return withRows(next);
    }

    /** End the job. Rows of a run without a clip stay unless an older clip is shown: the open component has failed. */
    State withJobEnded() {
        List<Row> left = new ArrayList<>();
        if (withJob(Job.NONE).clip() == null) {
            for (Row row : rows) {
                boolean open = row.phase() == Phase.LOADING || row.phase() == Phase.RUNNING;
                left.add(open ? new Row(row.component(), Phase.FAILED, row.backend(), 0, 0) : row);
            }
        }
        return withRows(left).withJob(Job.NONE);
    }

    Work work() {
        return job.work();
    }

    boolean isIdle() {
        return job.work() == Work.NONE;
    }

    /** The clip on the stage; null if the picture is there, as during a run. */
    Result clip() {
        return showsClip && work() != Work.RUNNING ? result : null;
    }

    /** The chosen model; null if it is not installed. */
    ArtifactStore.Installed model() {
        for (ArtifactStore.Installed installed : models) {
            if (installed.name().equals(modelName)) {
                return installed;
            }
        }
        return null;
    }

    /** Manifest of the chosen model; null without a model, or if it is not readable. */
    Manifest manifest() {
        ArtifactStore.Installed installed = model();
        return installed == null || installed.artifact() == null ? null : installed.artifact().manifest();
    }

    boolean isInstalled(String name) {
        return models.stream().anyMatch(installed -> installed.name().equals(name));
    }

    boolean canPick() {
        return isIdle() || work() == Work.INSTALLING;
    }

    boolean canRun() {
        return isIdle() && picture != null && manifest() != null;
    }
}
