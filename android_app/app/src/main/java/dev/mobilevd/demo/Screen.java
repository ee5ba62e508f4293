package dev.mobilevd.demo;

import android.app.Activity;
import android.graphics.drawable.AnimationDrawable;
import android.os.SystemClock;
import android.view.LayoutInflater;
import android.view.View;
import android.widget.Button;
import android.widget.EditText;
import android.widget.ImageView;
import android.widget.LinearLayout;
import android.widget.ProgressBar;
import android.widget.TextView;
import dev.mobilevd.core.ArtifactStore;
import dev.mobilevd.core.Backend;
import dev.mobilevd.core.Manifest;
import dev.mobilevd.core.Problem;
import java.util.ArrayList;
import java.util.List;

/** The views of the main screen. They show a {@link State}. */
final class Screen {
    private static final int PROGRESS_STEPS = 1000;

    private final Activity activity;
    private final StageView stage;
    private final ImageView picture;
    private final EditText seed;
    private final LinearLayout components;
    private final int minimumTimeWidth;
    private Object shown;

    /** The screen of an activity with the layout "main". */
    Screen(Activity activity) {
        this.activity = activity;
        stage = activity.findViewById(R.id.stage);
        picture = activity.findViewById(R.id.picture);
        seed = activity.findViewById(R.id.seed);
        components = activity.findViewById(R.id.components);
        minimumTimeWidth = activity.getResources().getDimensionPixelSize(R.dimen.time_width);
    }

    /**
     * Show everything.
     *
     * @param whyNotNpu why the next run will use the CPU; null if it will try the NPU
     */
    void draw(State state, Words whyNotNpu, boolean paused) {
        drawStage(state, paused);
        drawMessage(state);
        drawChoices(state);
        drawReport(state, whyNotNpu);
        stage.setKeepScreenOn(!state.isIdle());
    }

    private void drawStage(State state, boolean paused) {
        Manifest manifest = state.manifest();
        Result result = state.clip();
        if (result != null) {
            stage.setAspect((double) result.width() / result.height());
        } else if (manifest != null) {
            stage.setAspect((double) manifest.pipeline().width() / manifest.pipeline().height());
        }
        Object now = result != null ? result.frames() : state.picture();
        if (now != shown) {
            shown = now;
            if (result != null) {
                picture.setImageDrawable(result.animation(activity.getResources()));
            } else {
                picture.setImageBitmap(state.picture());
            }
        }
        if (result != null) {
            AnimationDrawable animation = (AnimationDrawable) picture.getDrawable();
            if (paused) {
                animation.stop();
            } else {
                animation.start();
            }
            stage.setContentDescription(activity.getString(paused ? R.string.clip_paused : R.string.clip_playing));
        } else {
            stage.setContentDescription(
                    activity.getString(state.picture() == null ? R.string.choose_picture : R.string.picture_chosen));
        }
        show(R.id.invitation, now == null);
        show(R.id.other_picture, now != null && state.canPick());
    }

    /** Errors are part of the page and stay; notices lie above it and disappear. */
    private void drawMessage(State state) {
        State.Message message = state.message();
        boolean isNotice = message != null && !message.isError();
        show(R.id.message, message != null && !isNotice);
        show(R.id.snackbar, isNotice);
        if (message == null) {
            return;
        }
        setText(isNotice ? R.id.snackbar_text : R.id.message_text, message.text().in(activity));
        show(R.id.snackbar_action, message.action() == State.Action.CANCEL_READING);
        show(R.id.message_action, message.action() == State.Action.USE_CPU && !state.cpuOnly());
    }

    private void drawChoices(State state) {
        boolean idle = state.isIdle();
        ArtifactStore.Installed model = state.model();
        setText(R.id.model_name, model != null ? label(model) : noModel(state));
        find(R.id.model).setEnabled(idle);
        if (!seed.getText().toString().equals(state.seed())) {
            seed.setText(state.seed());
        }
        seed.setEnabled(idle);
        find(R.id.dice).setEnabled(idle);
        Button go = activity.findViewById(R.id.go);
        boolean cancelling = state.job().isCancelling();
        go.setText(cancelling ? R.string.cancelling : idle ? R.string.go : R.string.cancel);
        go.setBackgroundResource(idle ? R.drawable.button_filled : R.drawable.button_tonal);
        go.setTextColor(activity.getColorStateList(idle ? R.color.text_filled : R.color.on_tonal));
        go.setEnabled(idle ? state.canRun() : !cancelling);
        show(R.id.take_away, state.clip() != null);
        find(R.id.save).setEnabled(idle && state.clip() != null && state.clip().saved() == null);
        find(R.id.share).setEnabled(idle);
    }

    private String noModel(State state) {
        String coming = state.job().installing();
        return coming != null ? coming : activity.getString(R.string.no_model);
    }

    /** A model's name, and its size or what is wrong with it. */
    String label(ArtifactStore.Installed model) {
        if (model.artifact() == null) {
            boolean newer = model.problem().problem() == Problem.MANIFEST_VERSION;
            return activity.getString(newer ? R.string.model_newer : R.string.model_damaged, model.name());
        }
        String size = Words.size(model.artifact().manifest().bytes()).in(activity);
        return activity.getString(R.string.model_with_size, model.name(), size);
    }

    /** Show what the app does or did, and how long each component took. */
    void drawReport(State state, Words whyNotNpu) {
        TextView headline = activity.findViewById(R.id.headline);
        Words explanation = null;
        Words said;
        List<State.Row> rows = state.rows();
        Result result = state.clip();
        if (state.work() == State.Work.INSTALLING) {
            String percent = Math.round(state.job().fraction() * 100) + " %";
            said =
                    state.job().installing() == null
                            ? Words.of(R.string.opening)
                            : Words.of(R.string.installing, state.job().installing(), percent);
        } else if (state.work() == State.Work.SAVING) {
            said = Words.of(R.string.saving);
        } else if (state.work() == State.Work.RUNNING) {
            said = Words.of(R.string.running, Words.seconds(state.job().elapsed()));
        } else if (result != null) {
            said = Words.of(ranOn(result), Words.time(result.wallMs()));
            explanation = whyNot(result);
            if (explanation == null && result.rows().stream().anyMatch(row -> row.backend() == Backend.NPU)) {
                explanation = Words.of(R.string.first_calls);
            }
            rows = new ArrayList<>();
            for (Result.Row row : result.rows()) {
                rows.add(new State.Row(row.component(), State.Phase.DONE, row.backend(), 0, row.ms()));
            }
            rows.add(new State.Row(State.Row.OTHER, State.Phase.DONE, null, 0, result.otherMs()));
        } else if (state.model() != null && state.model().problem() != null) {
            said = Words.of(R.string.model_unusable);
            explanation = Words.of(state.model().problem());
        } else {
            explanation = whyNotNpu;
            said = Words.of(explanation == null ? R.string.will_try_npu : R.string.will_use_cpu);
        }
        setText(headline, said.in(activity));
        show(R.id.explanation, explanation != null);
        if (explanation != null) {
            setText(R.id.explanation, explanation.in(activity));
        }
        show(R.id.delete, state.isIdle() && state.model() != null && state.model().problem() != null);
        ProgressBar progress = activity.findViewById(R.id.progress);
        show(R.id.progress, state.work() == State.Work.RUNNING || state.work() == State.Work.INSTALLING);
        progress.setProgress((int) Math.round(state.job().fraction() * PROGRESS_STEPS));
        // During a job the text changes ten times per second, which a screen reader must not announce.
        headline.setAccessibilityLiveRegion(
                state.isIdle() ? View.ACCESSIBILITY_LIVE_REGION_POLITE : View.ACCESSIBILITY_LIVE_REGION_NONE);
        drawRows(rows);
    }

    private static int ranOn(Result result) {
        boolean npu = result.rows().stream().anyMatch(row -> row.backend() == Backend.NPU);
        boolean cpu = result.rows().stream().anyMatch(row -> row.backend() == Backend.CPU);
        return npu && cpu ? R.string.ran_on_both : npu ? R.string.ran_on_npu : R.string.ran_on_cpu;
    }

    private static Words whyNot(Result result) {
        for (Result.Row row : result.rows()) {
            if (row.whyNotNpu() != null) {
                return Words.of(row.whyNotNpu());
            }
        }
        return null;
    }

    private void drawRows(List<State.Row> rows) {
        while (components.getChildCount() > rows.size()) {
            components.removeViewAt(components.getChildCount() - 1);
        }
        while (components.getChildCount() < rows.size()) {
            LayoutInflater.from(activity).inflate(R.layout.component, components, true);
        }
        for (int i = 0; i < rows.size(); i++) {
            drawRow(components.getChildAt(i), rows.get(i));
        }
        // All times get the width of the widest one, so that the badges beside them form a column.
        int widest = 0;
        for (int i = 0; i < rows.size(); i++) {
            TextView time = components.getChildAt(i).findViewById(R.id.time);
            widest = Math.max(widest, (int) Math.ceil(time.getPaint().measureText(time.getText().toString())));
        }
        for (int i = 0; i < rows.size(); i++) {
            TextView time = components.getChildAt(i).findViewById(R.id.time);
            time.setMinWidth(Math.max(widest, minimumTimeWidth));
        }
    }

    private void drawRow(View view, State.Row row) {
        String name = Words.component(row.component()).in(activity);
        boolean npu = row.backend() == Backend.NPU;
        String backend = row.backend() == null ? "" : activity.getString(npu ? R.string.npu : R.string.cpu);
        String time = "";
        String spoken;
        int mark;
        switch (row.phase()) {
            case WAITING -> {
                mark = R.drawable.ic_waiting;
                spoken = activity.getString(R.string.component_waiting, name);
            }
            case FAILED -> {
                mark = R.drawable.ic_failed;
                spoken = activity.getString(R.string.component_failed, name);
            }
            case DONE -> {
                mark = R.drawable.ic_done;
                time = Words.milliseconds(row.ms()).in(activity);
                spoken = activity.getString(R.string.component_done, name, backend, time);
            }
            default -> {
                mark = R.drawable.ic_running;
                time =
                        row.phase() == State.Phase.LOADING
                                ? activity.getString(R.string.loading)
                                : Words.seconds(SystemClock.uptimeMillis() - row.since()).in(activity);
                spoken = activity.getString(R.string.component_running, name, backend);
            }
        }
        ImageView icon = view.findViewById(R.id.mark);
        icon.setImageResource(mark);
        setText((TextView) view.findViewById(R.id.name), name);
        TextView badge = view.findViewById(R.id.backend);
        badge.setVisibility(row.backend() == null ? View.INVISIBLE : View.VISIBLE);
        badge.setBackgroundResource(npu ? R.drawable.badge_npu : R.drawable.badge_cpu);
        badge.setTextColor(activity.getColor(npu ? R.color.on_npu : R.color.on_cpu));
        setText(badge, backend);
        setText((TextView) view.findViewById(R.id.time), time);
        view.setContentDescription(spoken);
    }

    private View find(int id) {
        return activity.findViewById(id);
    }

    private void show(int id, boolean visible) {
        find(id).setVisibility(visible ? View.VISIBLE : View.GONE);
    }

    private void setText(int id, String text) {
        setText((TextView) find(id), text);
    }

    /** Set a text only if it changed: each call causes a layout, and a screen reader may announce it. */
    private static void setText(TextView view, String text) {
        if (!text.contentEquals(view.getText())) {
            view.setText(text);
        }
    }
}
