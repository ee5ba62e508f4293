package dev.mobilevd.demo;

import android.Manifest.permission;
import android.app.Activity;
import android.app.AlertDialog;
import android.content.ActivityNotFoundException;
import android.content.Intent;
import android.content.pm.PackageManager;
import android.net.Uri;
import android.os.Build;
import android.os.Bundle;
import android.os.Handler;
import android.os.Looper;
import android.os.Parcelable;
import android.provider.MediaStore;
import android.text.Editable;
import android.text.TextWatcher;
import android.view.Menu;
import android.view.MenuItem;
import android.view.View;
import android.widget.EditText;
import android.widget.PopupMenu;
import dev.mobilevd.core.ArtifactStore;
import java.util.ArrayList;
import java.util.List;

/** The main screen: a picture, a model, a seed, one button. It passes input to {@link Studio} and shows its state. */
public final class MainActivity extends Activity {
    private static final int PICK_PICTURE = 1;
    private static final int PICK_MODEL = 2;
    private static final int ALLOW_SAVE = 3;
    private static final int ALLOW_SHARE = 4;
    private static final int ALLOW_NOTIFY = 5;
    private static final int TICK_MS = 100;
    private static final String PAUSED = "paused";

    private final Handler ticks = new Handler(Looper.getMainLooper());
    private final Runnable tick = this::tick;
    private Studio studio;
    private Screen screen;
    private AlertDialog question;
    private Incoming.Offer asked;
    private boolean paused;

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        studio = ((DemoApp) getApplication()).studio();
        setContentView(R.layout.main);
        Edges.fit(this, findViewById(R.id.screen));
        screen = new Screen(this);
        findViewById(R.id.stage).setOnClickListener(view -> touchStage());
        findViewById(R.id.other_picture).setOnClickListener(view -> pickPicture());
        findViewById(R.id.more).setOnClickListener(this::showMenu);
        findViewById(R.id.model).setOnClickListener(view -> chooseModel());
        findViewById(R.id.dice).setOnClickListener(view -> studio.throwDice());
        findViewById(R.id.go).setOnClickListener(view -> go());
        findViewById(R.id.save).setOnClickListener(view -> save(ALLOW_SAVE));
        findViewById(R.id.share).setOnClickListener(view -> save(ALLOW_SHARE));
        findViewById(R.id.message_close).setOnClickListener(view -> studio.closeMessage());
        findViewById(R.id.message_action).setOnClickListener(view -> goOnWithCpu());
        findViewById(R.id.snackbar_action).setOnClickListener(view -> studio.cancelReading());
        findViewById(R.id.delete).setOnClickListener(view -> askToRemove(studio.state().model()));
        EditText seed = findViewById(R.id.seed);
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
        studio.refresh();
        draw();
    }

    @Override
    protected void onStop() {
        studio.watch(() -> {});
        ticks.removeCallbacks(tick);
        closeQuestion();
        if (!isChangingConfigurations()) {
            studio.leaveScreen();
        }
        super.onStop();
    }

    @Override
    protected void onSaveInstanceState(Bundle state) {
        super.onSaveInstanceState(state);
        state.putBoolean(PAUSED, paused);
    }

    /** Use the picture or model of an intent. The list of recent apps repeats old intents; they are ignored. */
    private void take(Intent intent) {
        if ((intent.getFlags() & Intent.FLAG_ACTIVITY_LAUNCHED_FROM_HISTORY) != 0) {
            return;
        }
        String action = String.valueOf(intent.getAction());
        if (action.equals(Intent.ACTION_SEND)) {
            Uri uri = stream(intent);
            if (uri != null) {
                studio.usePicture(uri);
            } else {
                studio.say(Words.of(R.string.not_a_picture, Intent.EXTRA_STREAM));
            }
        } else if (action.equals(Intent.ACTION_VIEW) && intent.getData() != null) {
            studio.offer(intent.getData());
        }
    }

    /** The shared address; null if there is none, or if the sender put something else there. */
    @SuppressWarnings("deprecation") // its replacement needs Android 13
    private static Uri stream(Intent intent) {
        try {
            Parcelable value = intent.getParcelableExtra(Intent.EXTRA_STREAM);
            return value instanceof Uri uri ? uri : null;
        } catch (RuntimeException error) { // a class that this app does not have
            return null;
        }
    }

    // Input.

    private void touchStage() {
        if (studio.state().clip() == null) {
            pickPicture();
        } else {
            paused = !paused;
            draw();
        }
    }

    private void pickPicture() {
        if (!studio.state().canPick()) {
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
            studio.offer(data.getData());
        }
    }

    private void go() {
        if (studio.state().isIdle()) {
            findViewById(R.id.seed).clearFocus();
            paused = false;
            askToNotify();
            studio.run();
        } else {
            studio.cancel();
        }
    }

    private void goOnWithCpu() {
        studio.setCpuOnly(true);
        studio.closeMessage();
    }

    /** Ask once for the notification of a run in the background. The run does not depend on the answer. */
    private void askToNotify() {
        Settings settings = new Settings(this);
        if (Build.VERSION.SDK_INT >= 33
                && !settings.askedToNotify()
                && checkSelfPermission(permission.POST_NOTIFICATIONS) != PackageManager.PERMISSION_GRANTED) {
            settings.setAskedToNotify();
            requestPermissions(new String[] {permission.POST_NOTIFICATIONS}, ALLOW_NOTIFY);
        }
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
        if (request == ALLOW_NOTIFY) {
            return;
        }
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
        if (!studio.state().isIdle()) {
            return;
        }
        List<ArtifactStore.Installed> models = studio.state().models();
        List<String> labels = new ArrayList<>();
        models.forEach(model -> labels.add(screen.label(model)));
        new AlertDialog.Builder(this)
                .setTitle(R.string.choose_model)
                .setSingleChoiceItems(
                        labels.toArray(new String[0]),
                        models.indexOf(studio.state().model()),
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
        boolean idle = studio.state().isIdle();
        MenuItem cpu = menu.add(R.string.cpu_only).setCheckable(true).setEnabled(idle);
        cpu.setChecked(studio.state().cpuOnly());
        cpu.setOnMenuItemClickListener(
                item -> {
                    studio.setCpuOnly(!studio.state().cpuOnly());
                    return true;
                });
        if (studio.state().result() != null && !studio.state().showsClip()) {
            add(menu, R.string.show_clip, getString(R.string.show_clip), idle, studio::showClip);
        }
        add(menu, R.string.open_model, getString(R.string.open_model), idle, this::pickModel);
        ArtifactStore.Installed model = studio.state().model();
        if (model != null) {
            String remove = getString(R.string.remove_model, model.name());
            add(menu, R.string.remove_model, remove, idle, () -> askToRemove(model));
        }
        popup.show();
    }

    private static void add(Menu menu, int id, String title, boolean enabled, Runnable action) {
        menu.add(Menu.NONE, id, Menu.NONE, title)
                .setEnabled(enabled)
                .setOnMenuItemClickListener(
                        item -> {
                            action.run();
                            return true;
                        });
    }

    private void askToRemove(ArtifactStore.Installed model) {
        new AlertDialog.Builder(this)
                .setTitle(getString(R.string.ask_remove, screen.label(model)))
                .setMessage(R.string.ask_remove_text)
                .setPositiveButton(R.string.remove, (dialog, which) -> studio.remove(model.name()))
                .setNegativeButton(R.string.cancel, null)
                .show();
    }

    /** Ask about the first offered file. Another app may have sent it, so the question names what is known of it. */
    private void askToInstall() {
        List<Incoming.Offer> offers = studio.state().offers();
        Incoming.Offer offer = offers.isEmpty() ? null : offers.get(0);
        if (offer == asked) {
            return;
        }
        closeQuestion();
        asked = offer;
        if (offer == null) {
            return;
        }
        boolean replaces = studio.state().isInstalled(offer.modelName());
        question =
                new AlertDialog.Builder(this)
                        .setTitle(getString(R.string.ask_install, offer.modelName()))
                        .setMessage(
                                Words.of(
                                                replaces ? R.string.ask_replace_text : R.string.ask_install_text,
                                                offer.bytes() < 0
                                                        ? Words.of(R.string.size_unknown)
                                                        : Words.size(offer.bytes()),
                                                offer.source(), offer.modelName())
                                        .in(this))
                        .setPositiveButton(
                                replaces ? R.string.replace : R.string.install,
                                (dialog, which) -> studio.install(offer))
                        .setNegativeButton(R.string.cancel, (dialog, which) -> studio.decline(offer))
                        .setOnCancelListener(dialog -> studio.decline(offer))
                        .show();
        // Another app's window above this one must not lead the finger.
        question.getButton(AlertDialog.BUTTON_POSITIVE).setFilterTouchesWhenObscured(true);
    }

    private void closeQuestion() {
        if (question != null) {
            question.dismiss();
        }
        question = null;
        asked = null;
    }

    // Output.

    private void draw() {
        screen.draw(studio.state(), studio.whyNotNpu(), paused);
        askToInstall();
        ticks.removeCallbacks(tick);
        if (!studio.state().isIdle()) {
            ticks.postDelayed(tick, TICK_MS);
        }
    }

    /** Update only what changes with time. */
    private void tick() {
        screen.drawReport(studio.state(), studio.whyNotNpu());
        ticks.postDelayed(tick, TICK_MS);
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
