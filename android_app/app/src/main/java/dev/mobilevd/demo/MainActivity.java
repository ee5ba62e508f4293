package dev.mobilevd.demo;

import android.Manifest.permission;
import android.app.Activity;
import android.app.AlertDialog;
import android.content.ActivityNotFoundException;
import android.content.Intent;
import android.content.pm.PackageManager;
import android.graphics.drawable.AnimationDrawable;
import android.net.Uri;
import android.os.Build;
import android.os.Bundle;
import android.os.Handler;
import android.os.Looper;
import android.os.SystemClock;
import android.provider.MediaStore;
import android.text.Editable;
import android.text.TextWatcher;
import android.view.LayoutInflater;
import android.view.Menu;
import android.view.MenuItem;
import android.view.View;
import android.widget.Button;
import android.widget.EditText;
import android.widget.ImageView;
import android.widget.LinearLayout;
import android.widget.PopupMenu;
import android.widget.ProgressBar;
import android.widget.TextView;
import dev.mobilevd.core.ArtifactStore;
import dev.mobilevd.core.Backend;
import dev.mobilevd.core.Manifest;
import dev.mobilevd.core.Problem;
import java.util.ArrayList;
import java.util.List;

/** The app's screen: a picture, a model, a seed, one button. It draws what {@link Studio} holds and keeps nothing. */
public final class MainActivity extends Activity {
    private static final int PICK_PICTURE = 1;
    private static final int PICK_MODEL = 2;
    private static final int ALLOW_SAVE = 3;
    private static final int ALLOW_SHARE = 4;
    private static final int TICK_MS = 100;
    private static final int PROGRESS_STEPS = 1000;
    private static final String PAUSED = "paused";

    private final Handler ticks = new Handler(Looper.getMainLooper());
    private final Runnable tick = this::tick;
    private Studio studio;
    private StageView stage;
    private ImageView picture;
    private EditText seed;
    private LinearLayout components;
    private Object shown;
    private boolean paused;

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        studio = ((DemoApp) getApplication()).studio();
        setContentView(R.layout.main);
        Edges.fit(this, findViewById(R.id.screen));
        stage = findViewById(R.id.stage);
        picture = findViewById(R.id.picture);
        seed = findViewById(R.id.seed);
        components = findViewById(R.id.components);
        stage.setOnClickListener(view -> touchStage());
        findViewById(R.id.other_picture).setOnClickListener(view -> pickPicture());
        findViewById(R.id.more).setOnClickListener(this::showMenu);
        findViewById(R.id.model).setOnClickListener(view -> chooseModel());
        findViewById(R.id.dice).setOnClickListener(view -> studio.throwDice());
        findViewById(R.id.go).setOnClickListener(view -> go());
        findViewById(R.id.save).setOnClickListener(view -> save(ALLOW_SAVE));
        findViewById(R.id.share).setOnClickListener(view -> save(ALLOW_SHARE));
        findViewById(R.id.message_close).setOnClickListener(view -> studio.closeMessage());
        findViewById(R.id.message_action).setOnClickListener(view -> goOnWithCpu());
        seed.addTextChangedListener(new SeedWatcher());
        if (state == null) {
            take(getIntent());
        } else {
            paused = state.getBoolean(PAUSED);
        }
    }

    @Override
    protected void onNewIntent(Intent intent) {
        super.onNewIntent(intent);
        setIntent(intent);
        take(intent);
    }

    @Override
    protected void onStart() {
        super.onStart();
        studio.watch(this::draw);
        studio.refreshModels();
        draw();
    }

    @Override
    protected void onStop() {
        studio.watch(() -> {});
        ticks.removeCallbacks(tick);
        super.onStop();
    }

    @Override
    protected void onSaveInstanceState(Bundle state) {
        super.onSaveInstanceState(state);
        state.putBoolean(PAUSED, paused);
    }

    /** Take what another app gives: a picture, or a model. Opened from the list of recent apps, it was taken before. */
    @SuppressWarnings("deprecation") // what replaces getParcelableExtra came with Android 13
    private void take(Intent intent) {
        if ((intent.getFlags() & Intent.FLAG_ACTIVITY_LAUNCHED_FROM_HISTORY) != 0) {
            return;
        }
        String action = String.valueOf(intent.getAction());
        if (action.equals(Intent.ACTION_SEND)) {
            Uri uri = intent.getParcelableExtra(Intent.EXTRA_STREAM);
            if (uri != null) {
                studio.usePicture(uri);
            }
        } else if (action.equals(Intent.ACTION_VIEW) && intent.getData() != null) {
            studio.install(intent.getData());
        }
    }

    // What the person does.

    private void touchStage() {
        if (studio.result() == null) {
            pickPicture();
        } else {
            paused = !paused;
            draw();
        }
    }

    private void pickPicture() {
        if (!studio.canPick()) {
            return;
        }
        Intent picker = new Intent(Intent.ACTION_GET_CONTENT).addCategory(Intent.CATEGORY_OPENABLE);
        if (Build.VERSION.SDK_INT >= 33) {
            picker = new Intent(MediaStore.ACTION_PICK_IMAGES);
        }
        pick(picker.setType("image/*"), PICK_PICTURE);
    }

    private void pickModel() {
        pick(
                new Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("*/*"),
                PICK_MODEL);
    }

    private void pick(Intent picker, int request) {
        try {
            startActivityForResult(picker, request);
        } catch (ActivityNotFoundException error) {
            studio.say(Words.of(R.string.no_picker));
        }
    }

    @Override
    protected void onActivityResult(int request, int outcome, Intent data) {
        super.onActivityResult(request, outcome, data);
        if (outcome != RESULT_OK || data == null || data.getData() == null) {
            return;
        }
        if (request == PICK_PICTURE) {
            studio.usePicture(data.getData());
        } else if (request == PICK_MODEL) {
            studio.install(data.getData());
        }
    }

    private void go() {
        if (studio.work() == Studio.Work.NONE) {
            seed.clearFocus();
            paused = false;
            studio.run();
        } else {
            studio.cancel();
        }
    }

    private void goOnWithCpu() {
        studio.setCpuOnly(true);
        studio.closeMessage();
    }

    private void save(int request) {
        if (Build.VERSION.SDK_INT < 29
                && checkSelfPermission(permission.WRITE_EXTERNAL_STORAGE) != PackageManager.PERMISSION_GRANTED) {
            requestPermissions(new String[] {permission.WRITE_EXTERNAL_STORAGE}, request);
            return;
        }
        studio.save(
                uri -> {
                    if (request == ALLOW_SHARE) {
                        share(uri);
                    }
                });
    }

    @Override
    public void onRequestPermissionsResult(int request, String[] permissions, int[] granted) {
        super.onRequestPermissionsResult(request, permissions, granted);
        if (granted.length > 0 && granted[0] == PackageManager.PERMISSION_GRANTED) {
            save(request);
        } else {
            studio.say(Words.of(R.string.needs_gallery));
        }
    }

    private void share(Uri uri) {
        Intent send = new Intent(Intent.ACTION_SEND).setType("video/mp4").putExtra(Intent.EXTRA_STREAM, uri);
        send.addFlags(Intent.FLAG_GRANT_READ_URI_PERMISSION);
        startActivity(Intent.createChooser(send, null));
    }

    private void chooseModel() {
        if (studio.work() != Studio.Work.NONE) {
            return;
        }
        List<ArtifactStore.Installed> models = studio.models();
        List<String> labels = new ArrayList<>();
        models.forEach(model -> labels.add(label(model)));
        new AlertDialog.Builder(this)
                .setTitle(R.string.choose_model)
                .setSingleChoiceItems(
                        labels.toArray(new String[0]),
                        models.indexOf(studio.model()),
                        (dialog, which) -> {
                            studio.choose(models.get(which).name());
                            dialog.dismiss();
                        })
                .setNeutralButton(R.string.open_model, (dialog, which) -> pickModel())
                .setNegativeButton(R.string.close, null)
                .show();
    }

    private void showMenu(View anchor) {
        PopupMenu popup = new PopupMenu(this, anchor);
        Menu menu = popup.getMenu();
        boolean idle = studio.work() == Studio.Work.NONE;
        MenuItem cpu = menu.add(R.string.cpu_only).setCheckable(true).setChecked(studio.cpuOnly()).setEnabled(idle);
        cpu.setOnMenuItemClickListener(
                item -> {
                    studio.setCpuOnly(!studio.cpuOnly());
                    return true;
                });
        add(menu, getString(R.string.open_model), idle, this::pickModel);
        ArtifactStore.Installed model = studio.model();
        if (model != null) {
            add(menu, getString(R.string.remove_model, model.name()), idle, () -> studio.remove(model.name()));
        }
        popup.show();
    }

    private static void add(Menu menu, String title, boolean enabled, Runnable action) {
        menu.add(title)
                .setEnabled(enabled)
                .setOnMenuItemClickListener(
                        item -> {
                            action.run();
                            return true;
                        });
    }

    // What is drawn.

    private void draw() {
        drawStage();
        drawMessage();
        drawChoices();
        drawReport();
        boolean working = studio.work() != Studio.Work.NONE;
        stage.setKeepScreenOn(working);
        ticks.removeCallbacks(tick);
        if (working) {
            ticks.postDelayed(tick, TICK_MS);
        }
    }

    /** Only what changes with time. */
    private void tick() {
        drawReport();
        ticks.postDelayed(tick, TICK_MS);
    }

    private void drawStage() {
        Manifest manifest = studio.manifest();
        Result result = studio.result();
        if (result != null) {
            stage.setAspect((double) result.width() / result.height());
        } else if (manifest != null) {
            stage.setAspect((double) manifest.pipeline().width() / manifest.pipeline().height());
        }
        Object now = result != null ? result.frames() : studio.picture();
        if (now != shown) {
            shown = now;
            if (result != null) {
                picture.setImageDrawable(result.animation(getResources()));
            } else {
                picture.setImageBitmap(studio.picture());
            }
        }
        if (result != null) {
            AnimationDrawable animation = (AnimationDrawable) picture.getDrawable();
            if (paused) {
                animation.stop();
            } else {
                animation.start();
            }
            stage.setContentDescription(getString(paused ? R.string.clip_paused : R.string.clip_playing));
        } else {
            stage.setContentDescription(
                    getString(studio.picture() == null ? R.string.choose_picture : R.string.picture_chosen));
        }
        show(R.id.invitation, now == null);
        show(R.id.other_picture, now != null && studio.canPick());
    }

    private void drawMessage() {
        Studio.Message message = studio.message();
        show(R.id.message, message != null);
        if (message == null) {
            return;
        }
        findViewById(R.id.message)
                .setBackgroundResource(message.isError() ? R.drawable.message_error : R.drawable.message_notice);
        int colour = getColor(message.isError() ? R.color.on_error_container : R.color.on_notice_container);
        TextView text = findViewById(R.id.message_text);
        setText(text, message.text().in(this));
        text.setTextColor(colour);
        Button action = findViewById(R.id.message_action);
        show(R.id.message_action, message.offersCpu() && !studio.cpuOnly());
        action.setText(R.string.use_cpu);
        action.setTextColor(colour);
        ((Button) findViewById(R.id.message_close)).setTextColor(colour);
    }

    private void drawChoices() {
        boolean idle = studio.work() == Studio.Work.NONE;
        ArtifactStore.Installed model = studio.model();
        setText(findViewById(R.id.model_name), model != null ? label(model) : noModel());
        findViewById(R.id.model).setEnabled(idle);
        if (!seed.getText().toString().equals(studio.seed())) {
            seed.setText(studio.seed());
        }
        seed.setEnabled(idle);
        findViewById(R.id.dice).setEnabled(idle);
        Button go = findViewById(R.id.go);
        boolean cancellable = !idle && studio.work() != Studio.Work.SAVING;
        go.setText(
                studio.isCancelling() ? R.string.cancelling : cancellable ? R.string.cancel : R.string.go);
        go.setBackgroundResource(cancellable ? R.drawable.button_tonal : R.drawable.button_filled);
        go.setTextColor(getColorStateList(cancellable ? R.color.on_tonal : R.color.text_filled));
        go.setEnabled(cancellable ? !studio.isCancelling() : studio.canRun());
        show(R.id.take_away, studio.result() != null && studio.work() != Studio.Work.RUNNING);
        findViewById(R.id.save).setEnabled(idle && studio.result() != null && studio.result().saved() == null);
        findViewById(R.id.share).setEnabled(idle);
    }

    private String noModel() {
        String coming = studio.installing();
        return coming != null ? coming : getString(R.string.no_model);
    }

    private String label(ArtifactStore.Installed model) {
        if (model.artifact() == null) {
            boolean newer = model.problem().problem() == Problem.MANIFEST_VERSION;
            return getString(newer ? R.string.model_newer : R.string.model_damaged, model.name());
        }
        String size = Words.size(model.artifact().manifest().bytes()).in(this);
        return getString(R.string.model_with_size, model.name(), size);
    }

    private void drawReport() {
        TextView headline = findViewById(R.id.headline);
        Words explanation = null;
        Words said;
        List<Studio.Row> rows = studio.rows();
        Result result = studio.result();
        if (studio.work() == Studio.Work.INSTALLING) {
            String percent = Math.round(studio.fraction() * 100) + " %";
            said =
                    studio.installing() == null
                            ? Words.of(R.string.opening)
                            : Words.of(R.string.installing, studio.installing(), percent);
        } else if (studio.work() == Studio.Work.SAVING) {
            said = Words.of(R.string.saving);
        } else if (studio.work() == Studio.Work.RUNNING) {
            said = Words.of(R.string.running, Words.seconds(studio.elapsed()));
        } else if (result != null) {
            said = Words.of(ranOn(result), Words.time(result.wallMs()));
            explanation = whyNot(result);
            rows = new ArrayList<>();
            for (Result.Row row : result.rows()) {
                rows.add(new Studio.Row(row.component(), Studio.Phase.DONE, row.backend(), 0, row.ms()));
            }
        } else if (studio.model() != null && studio.model().problem() != null) {
            said = Words.of(R.string.model_unusable);
            explanation = Words.of(studio.model().problem());
        } else {
            explanation = studio.whyNotNpu();
            said = Words.of(explanation == null ? R.string.will_try_npu : R.string.will_use_cpu);
        }
        setText(headline, said.in(this));
        show(R.id.explanation, explanation != null);
        if (explanation != null) {
            setText(findViewById(R.id.explanation), explanation.in(this));
        }
        ProgressBar progress = findViewById(R.id.progress);
        show(R.id.progress, studio.work() == Studio.Work.RUNNING || studio.work() == Studio.Work.INSTALLING);
        progress.setProgress((int) Math.round(studio.fraction() * PROGRESS_STEPS));
        // A live region must not speak ten times a second.
        headline.setAccessibilityLiveRegion(
                studio.work() == Studio.Work.NONE
                        ? View.ACCESSIBILITY_LIVE_REGION_POLITE
                        : View.ACCESSIBILITY_LIVE_REGION_NONE);
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

    private void drawRows(List<Studio.Row> rows) {
        while (components.getChildCount() > rows.size()) {
            components.removeViewAt(components.getChildCount() - 1);
        }
        while (components.getChildCount() < rows.size()) {
            LayoutInflater.from(this).inflate(R.layout.component, components, true);
        }
        for (int i = 0; i < rows.size(); i++) {
            drawRow(components.getChildAt(i), rows.get(i));
        }
    }

    private void drawRow(View view, Studio.Row row) {
        String name = Words.component(row.component());
        String backend = row.backend() == null ? "" : getString(row.backend() == Backend.NPU ? R.string.npu : R.string.cpu);
        String time = "";
        String spoken;
        int mark;
        switch (row.phase()) {
            case WAITING -> {
                mark = R.drawable.ic_waiting;
                spoken = getString(R.string.component_waiting, name);
            }
            case FAILED -> {
                mark = R.drawable.ic_failed;
                spoken = getString(R.string.component_failed, name);
            }
            case DONE -> {
                mark = R.drawable.ic_done;
                time = Words.milliseconds(row.ms()).in(this);
                spoken = getString(R.string.component_done, name, backend, time);
            }
            default -> {
                mark = R.drawable.ic_running;
                time =
                        row.phase() == Studio.Phase.LOADING
                                ? getString(R.string.loading)
                                : Words.seconds(SystemClock.uptimeMillis() - row.since()).in(this);
                spoken = getString(R.string.component_running, name, backend);
            }
        }
        ((ImageView) view.findViewById(R.id.mark)).setImageResource(mark);
        setText(view.findViewById(R.id.name), name);
        TextView badge = view.findViewById(R.id.backend);
        boolean npu = row.backend() == Backend.NPU;
        badge.setVisibility(row.backend() == null ? View.INVISIBLE : View.VISIBLE);
        badge.setBackgroundResource(npu ? R.drawable.badge_npu : R.drawable.badge_cpu);
        badge.setTextColor(getColor(npu ? R.color.on_npu : R.color.on_cpu));
        setText(badge, backend);
        setText(view.findViewById(R.id.time), time);
        view.setContentDescription(spoken);
    }

    private void show(int id, boolean visible) {
        findViewById(id).setVisibility(visible ? View.VISIBLE : View.GONE);
    }

    /** Touch a text only if it changes: every touch lays the screen out anew, and a screen reader may speak. */
    private static void setText(TextView view, String text) {
        if (!text.contentEquals(view.getText())) {
            view.setText(text);
        }
    }

    private final class SeedWatcher implements TextWatcher {
        @Override
        public void beforeTextChanged(CharSequence text, int start, int count, int after) {}

        @Override
        public void onTextChanged(CharSequence text, int start, int before, int count) {}

        @Override
        public void afterTextChanged(Editable text) {
            studio.setSeed(text.toString());
        }
    }
}
