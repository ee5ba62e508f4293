package dev.mobilevd.demo;

import static org.junit.Assert.assertArrayEquals;
import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertNotEquals;
import static org.junit.Assert.assertNotNull;
import static org.junit.Assert.assertNotSame;
import static org.junit.Assert.assertNull;
import static org.junit.Assert.assertTrue;
import static org.robolectric.Shadows.shadowOf;

import android.Manifest;
import android.content.ContentValues;
import android.content.Intent;
import android.content.pm.PackageManager;
import android.graphics.drawable.AnimationDrawable;
import android.net.Uri;
import android.os.Build;
import android.os.Bundle;
import android.os.Looper;
import android.provider.MediaStore;
import android.view.View;
import android.view.ViewGroup;
import android.widget.EditText;
import android.widget.ImageView;
import dev.mobilevd.core.Backend;
import dev.mobilevd.core.MobileVdException;
import dev.mobilevd.core.Problem;
import dev.mobilevd.core.Runtimes;
import java.io.ByteArrayOutputStream;
import java.io.FileOutputStream;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;
import java.util.zip.ZipEntry;
import java.util.zip.ZipOutputStream;
import org.junit.Test;
import org.junit.runner.RunWith;
import org.robolectric.Robolectric;
import org.robolectric.RobolectricTestRunner;
import org.robolectric.RuntimeEnvironment;
import org.robolectric.annotation.Config;
import org.robolectric.annotation.GraphicsMode;

/** The main screen. It runs the demo's artifact on ONNX Runtime for the desktop. */
@RunWith(RobolectricTestRunner.class)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
@Config(sdk = 34, qualifiers = "w411dp-h891dp-mdpi")
public final class MainActivityTest {
    private static final String TOO_LITTLE = "Not enough storage: %s are needed, %s are free[.]";
    private static final byte[] FILM = "a film".getBytes(StandardCharsets.US_ASCII);

    @Test
    @Config(sdk = {28, 34})
    public void aPictureBecomesAClip() throws Exception {
        Phone phone = new Phone();
        phone.open();
        assertFalse("without a picture there is nothing to do", go(phone).isEnabled());
        phone.choosePicture();
        phone.make();
        assertEquals("", phone.message());
        Result result = phone.state().result();
        assertEquals(14, result.frames().size());
        assertEquals(4, result.rows().size());
        assertNotEquals("the frames differ", hash(result, 0), hash(result, 13));
        assertTrue(phone.text(R.id.headline), phone.text(R.id.headline).startsWith("Ran on the CPU · "));
        assertTrue(phone.text(R.id.explanation), phone.text(R.id.explanation).contains("no libraries for the NPU"));
        AnimationDrawable clip = clip(phone);
        assertTrue(clip.isRunning());
        Object first = clip.getCurrent();
        shadowOf(Looper.getMainLooper()).idleFor(1, TimeUnit.SECONDS);
        assertNotSame("the clip moves", first, clip.getCurrent());
        phone.click(R.id.stage);
        assertFalse("a touch pauses it", clip(phone).isRunning());
    }

    @Test
    @Config(sdk = 34, fontScale = 1.6f)
    public void badgesFormAColumnInLargeLetters() {
        Phone phone = new Phone();
        phone.open();
        phone.studio()
                .change(
                        now ->
                                now.withRows(
                                        List.of(
                                                new State.Row("unet", State.Phase.DONE, Backend.CPU, 0, 9.2),
                                                new State.Row("decoder", State.Phase.DONE, Backend.CPU, 0, 12_345))));
        Phone.screenshot(phone.activity());
        ViewGroup rows = phone.activity().findViewById(R.id.components);
        int first = rows.getChildAt(0).findViewById(R.id.backend).getRight();
        assertEquals(first, rows.getChildAt(1).findViewById(R.id.backend).getRight());
        assertTrue(first > 0);
    }

    @Test
    public void theSeedDecidesTheClip() throws Exception {
        Phone phone = new Phone();
        phone.open();
        phone.choosePicture();
        phone.make();
        int first = hash(phone.state().result(), 13);
        type(phone, "2");
        phone.make();
        assertNotEquals(first, hash(phone.state().result(), 13));
        type(phone, "1");
        phone.make();
        assertEquals(first, hash(phone.state().result(), 13));
        type(phone, "18446744073709551616");
        phone.make();
        assertTrue(phone.message(), phone.message().contains("is not a seed"));
    }

    @Test
    public void aRunIsCancelled() throws Exception {
        Gate gate = new Gate("unet");
        Phone phone = started(gate);
        assertEquals("Cancel", phone.text(R.id.go));
        phone.click(R.id.go);
        assertEquals("Cancelling …", phone.text(R.id.go));
        gate.open();
        phone.untilIdle();
        assertNull(phone.state().result());
        assertEquals("to cancel is no error", "", phone.message());
        assertEquals("Make it move", phone.text(R.id.go));
        assertEquals(State.Phase.DONE, phone.state().rows().get(0).phase());
        assertEquals(State.Phase.FAILED, phone.state().rows().get(2).phase());
        phone.make();
        assertNotNull("the next run is not cancelled", phone.state().result());
    }

    @Test
    public void aRunSurvivesTheTurnOfThePhone() throws Exception {
        Gate gate = new Gate("unet");
        Phone phone = started(gate);
        MainActivity before = phone.activity();
        RuntimeEnvironment.setQualifiers("+w891dp-h411dp-land");
        phone.controller.recreate();
        phone.settle();
        assertNotSame(before, phone.activity());
        assertEquals("Cancel", phone.text(R.id.go));
        assertTrue(phone.text(R.id.headline), phone.text(R.id.headline).startsWith("Running"));
        gate.open();
        phone.untilIdle();
        assertTrue(phone.text(R.id.headline), phone.text(R.id.headline).startsWith("Ran on the CPU"));
        assertTrue("the new screen plays it", clip(phone).isRunning());
    }

    @Test
    public void whatWasMadeSurvivesTheProcess() throws Exception {
        Phone phone = new Phone();
        phone.open();
        phone.choosePicture();
        type(phone, "4711");
        phone.make();
        int last = hash(phone.state().result(), 13);
        Bundle state = new Bundle();
        phone.controller.saveInstanceState(state).pause().stop().destroy();
        phone.restart();
        phone.controller = Robolectric.buildActivity(MainActivity.class).setup(state);
        phone.until("the clip is back", () -> phone.state().result() != null && phone.state().model() != null);
        assertEquals(last, hash(phone.state().result(), 13));
        assertEquals("4711", phone.text(R.id.seed));
        assertNotNull(phone.state().picture());
        assertEquals("nothing went wrong", "", phone.message());
        assertTrue(phone.text(R.id.headline), phone.text(R.id.headline).startsWith("Ran on the CPU"));
    }

    @Test
    public void theEndInMidRunIsReported() throws Exception {
        Gate gate = new Gate("unet");
        Phone phone = started(gate);
        Studio before = phone.studio();
        Bundle state = new Bundle();
        phone.controller.saveInstanceState(state).pause().stop().destroy();
        phone.restart();
        phone.controller = Robolectric.buildActivity(MainActivity.class).setup(state);
        phone.until("all is back", () -> phone.state().picture() != null && phone.state().model() != null);
        assertTrue(
                phone.message(),
                phone.message().contains("while UNet was running on the CPU (model demo, step: load)"));
        assertFalse("the CPU is no way out of a crash on the CPU", phone.shows(R.id.message_action));
        before.cancel();
        gate.open();
        phone.click(R.id.message_close);
        assertEquals("", phone.message());
        assertTrue(go(phone).isEnabled());
    }

    @Test
    public void afterACrashOnTheNpuTheCpuIsOffered() throws Exception {
        Phone phone = new Phone();
        Files.writeString(
                phone.app.getNoBackupFilesDir().toPath().resolve("running.json"),
                "{\"artifact\": \"demo\", \"component\": \"vae_encoder\", \"part\": 1, \"parts\": 2,"
                        + " \"backend\": \"npu\", \"stage\": \"run\"}");
        phone.restart();
        phone.open();
        assertTrue(
                phone.message(),
                phone.message().contains("while VAE encoder was running on the NPU (model demo, step: run)"));
        phone.click(R.id.message_action);
        assertTrue(phone.state().cpuOnly());
        assertEquals("", phone.message());
        phone.restart();
        phone.open();
        assertEquals("it is said once", "", phone.message());
    }

    @Test
    public void theReasonForTheCpuIsShown() throws Exception {
        Phone phone = new Phone();
        phone.open();
        phone.choosePicture();
        for (MobileVdException why :
                new MobileVdException[] {
                    new MobileVdException(Problem.NPU_OTHER_CHIP, "unet", "SM8650", "SM8750"),
                    new MobileVdException(Problem.NPU_RUNTIME_OLD, "unet", "v2.51.0.260929181845", "v2.49.0.1"),
                }) {
            phone.restart(new NoNpu(why).runtimes());
            phone.open();
            phone.until("the picture is back", () -> phone.state().picture() != null);
            phone.make();
            assertTrue(phone.text(R.id.headline), phone.text(R.id.headline).startsWith("Ran on the CPU"));
            assertEquals(why.getMessage(), phone.text(R.id.explanation));
        }
    }

    @Test
    public void aRuntimeThatDoesNotLoadIsSaid() throws Exception {
        Phone phone = new Phone();
        phone.open();
        phone.choosePicture();
        phone.app.start(
                new Device(phone.app) {
                    @Override
                    synchronized Runtimes runtimes() {
                        throw new NoClassDefFoundError("ai/onnxruntime/OrtEnvironment"); // the second time
                    }
                });
        phone.open();
        phone.until("the picture is back", () -> phone.state().picture() != null);
        phone.make();
        assertEquals("That failed: ai/onnxruntime/OrtEnvironment", phone.message());
    }

    @Test
    public void tooLittleMemoryIsSaidInNumbers() throws Exception {
        Phone phone = new Phone();
        phone.open();
        phone.choosePicture();
        phone.memory(5_000_000);
        phone.make();
        assertTrue(
                phone.message(),
                phone.message().matches("\\w+ needs about \\d+ MB of memory, 5[.]0+ MB are available.*"));
        phone.memory(8L << 30);
        phone.make();
        assertEquals("", phone.message());
    }

    @Test
    public void theFirstStartShowsHowFarTheModelIsUnpacked() throws Exception {
        Phone phone = new Phone();
        Door unpacking = phone.openFirst(() -> Long.MAX_VALUE);
        assertEquals("Installing demo · 0 %", phone.text(R.id.headline));
        assertTrue(phone.shows(R.id.progress));
        assertEquals("demo", phone.text(R.id.model_name));
        phone.click(R.id.stage);
        assertNotNull("a picture can be chosen meanwhile", shadowOf(phone.activity()).getNextStartedActivityForResult());
        unpacking.open();
        phone.untilDone(0.4);
        assertTrue(phone.text(R.id.headline), phone.text(R.id.headline).matches("Installing demo · 4\\d %"));
        phone.untilIdle();
        assertFalse(phone.shows(R.id.progress));
        assertEquals("demo", phone.state().model().name());
        assertEquals("", phone.message());
    }

    @Test
    public void tooLittleStorageIsSaidInNumbers() throws Exception {
        Robolectric.setupContentProvider(FakeGallery.class, MediaStore.AUTHORITY);
        Phone phone = withClip();
        byte[] file = phone.mvd();
        AtomicLong free = new AtomicLong(5_000_000);
        phone.restart(free::get);
        phone.open();
        phone.openModel("other.mvd", file);
        phone.untilIdle();
        assertTrue(phone.message(), phone.message().matches(TOO_LITTLE.formatted("2\\d MB", "5[.]0+ MB")));
        assertEquals(1, phone.state().models().size());

        free.set(1_000_000);
        phone.click(R.id.save);
        phone.untilIdle();
        assertTrue(phone.message(), phone.message().matches(TOO_LITTLE.formatted("4[.]\\d+ MB", "1[.]0+ MB")));
        assertEquals(0, FakeGallery.ENTRIES.size());
        assertNotNull("the clip is still there", phone.state().result());
    }

    @Test
    public void storageThatFillsWhileAClipIsSavedIsNamed() throws Exception {
        Robolectric.setupContentProvider(FakeGallery.class, MediaStore.AUTHORITY);
        Phone phone = withClip();
        AtomicLong free = new AtomicLong(Long.MAX_VALUE);
        phone.restart(free::get);
        phone.studio()
                .encodeWith(
                        (clip, target, cancel) -> {
                            free.set(0);
                            throw new IOException("write failed: ENOSPC");
                        });
        phone.open();
        phone.until("the clip is back", () -> phone.state().result() != null);
        phone.click(R.id.save);
        phone.untilIdle();
        assertTrue(phone.message(), phone.message().matches(TOO_LITTLE.formatted("4[.]\\d+ MB", "0 B")));
        assertEquals(0, FakeGallery.ENTRIES.size());
    }

    @Test
    public void theModelIsUnpackedOnceThereIsRoom() throws Exception {
        Phone phone = new Phone();
        AtomicLong free = new AtomicLong(5_000_000);
        phone.openFirst(free::get).open();
        phone.untilIdle();
        assertTrue(phone.message(), phone.message().matches(TOO_LITTLE.formatted("2\\d MB", "5[.]0+ MB")));
        assertNull(phone.state().model());
        free.set(Long.MAX_VALUE);
        phone.open(); // coming back to the app is enough
        phone.untilIdle();
        assertEquals("demo", phone.state().model().name());
        assertEquals("", phone.message());
    }

    @Test
    public void aDamagedModelIsNamed() throws Exception {
        Phone phone = new Phone();
        phone.open();
        phone.choosePicture();
        Path data = phone.modelFolder().resolve("unet/model.onnx.data");
        byte[] bytes = Files.readAllBytes(data);
        bytes[1000] ^= 1;
        Files.write(data, bytes);
        phone.make();
        assertTrue(phone.message(), phone.message().startsWith("unet/model.onnx.data is damaged"));

        Files.write(data, new byte[10]);
        phone.studio().refresh();
        phone.until("the loss is noticed", () -> phone.state().manifest() == null);
        assertTrue(phone.text(R.id.model_name), phone.text(R.id.model_name).contains("damaged"));
        assertTrue(phone.text(R.id.explanation), phone.text(R.id.explanation).contains("has the wrong size: 10 B instead of"));
        assertFalse(go(phone).isEnabled());
    }

    @Test
    public void anUnknownManifestVersionIsNamed() throws Exception {
        Phone phone = new Phone();
        phone.open();
        phone.makeNewer(phone.modelFolder());
        phone.studio().refresh();
        phone.until("the change is noticed", () -> phone.state().manifest() == null);
        assertEquals(
                "The artifact has manifest version 2; this app reads version 1. Get a newer app.",
                phone.text(R.id.explanation));
        assertEquals("it is not damaged", "demo · needs a newer app", phone.text(R.id.model_name));
    }

    @Test
    public void aPictureIsShared() throws Exception {
        Phone phone = new Phone();
        phone.open(share(phone.picture()));
        phone.until("the picture is there", () -> phone.state().picture() != null);
        assertTrue(go(phone).isEnabled());

        Uri text = phone.content("text.png", "no picture".getBytes(StandardCharsets.US_ASCII));
        phone.controller.newIntent(share(text));
        phone.until("it is refused", () -> phone.state().message() != null);
        assertTrue(phone.message(), phone.message().startsWith("This picture cannot be read"));
        assertNotNull("the one before stays", phone.state().picture());

        Uri own = Uri.fromFile(phone.app.getNoBackupFilesDir().toPath().resolve("clip").toFile());
        phone.studio().closeMessage();
        phone.controller.newIntent(share(own));
        phone.until("a path is refused", () -> phone.state().message() != null);
    }

    @Test
    public void whateverTheOtherAppThrowsIsSaid() throws Exception {
        Phone phone = new Phone();
        phone.open();
        Uri uri = Uri.parse("content://photos/1");
        for (RuntimeException error :
                new RuntimeException[] {
                    new IllegalArgumentException("unknown address"), new IllegalStateException("not unlocked"),
                    new SecurityException("not for you"),
                }) {
            shadowOf(phone.app.getContentResolver())
                    .registerInputStreamSupplier(
                            uri,
                            () -> {
                                throw error;
                            });
            phone.controller.newIntent(share(uri));
            phone.until("it is refused", () -> phone.state().message() != null);
            assertEquals("This picture cannot be read: " + error.getMessage(), phone.message());
            phone.click(R.id.message_close);
        }
    }

    @Test
    public void aPictureSharedInMidRunDoesNotTakeTheClip() throws Exception {
        Gate gate = new Gate("unet");
        Phone phone = started(gate);
        phone.controller.newIntent(share(phone.picture()));
        String said = "A clip is being generated. Share the picture again when it is done.";
        assertEquals(said, phone.message());
        gate.open();
        phone.untilIdle();
        assertNotNull(phone.state().result());
        assertEquals("it can still be read", said, phone.message());
    }

    @Test
    public void aRunThatBeginsWhileAPictureIsReadKeepsItsClip() throws Exception {
        Phone phone = new Phone();
        phone.open();
        phone.choosePicture();
        Door reading = new Door();
        phone.studio().afterwards(reading::pass);
        phone.controller.newIntent(share(phone.picture()));
        phone.click(R.id.go);
        reading.open();
        phone.untilIdle();
        phone.restart();
        phone.open();
        phone.until("the clip is back", () -> phone.state().result() != null);
    }

    @Test
    public void whatWasTakenIsNotTakenAgainFromTheRecentApps() throws Exception {
        Phone phone = new Phone();
        phone.open(share(phone.picture()).addFlags(Intent.FLAG_ACTIVITY_LAUNCHED_FROM_HISTORY));
        assertFalse(phone.studio().isReading());
        assertNull(phone.state().picture());
    }

    @Test
    public void aModelFileIsInstalledAndRemoved() throws Exception {
        Phone phone = new Phone();
        phone.open();
        phone.openModel("My model (2).mvd", phone.mvd());
        assertTrue(phone.text(R.id.headline), phone.text(R.id.headline).matches("Opening the file …|Installing My-.*"));
        phone.untilIdle();
        assertEquals("My-model-2-", phone.state().model().name());
        assertEquals("My-model-2- is installed.", phone.message());
        phone.studio().remove("My-model-2-");
        phone.until("it is gone", () -> phone.state().models().size() == 1);
        assertEquals("demo", phone.state().model().name());
    }

    @Test
    public void aNoticeDisappearsAndAnErrorStays() throws Exception {
        Phone phone = new Phone();
        phone.open();
        phone.openModel("other.mvd", phone.mvd());
        phone.untilIdle();
        assertFalse("it does not move the page", phone.shows(R.id.message));
        assertEquals("other is installed.", phone.message());
        shadowOf(Looper.getMainLooper()).idleFor(7, TimeUnit.SECONDS);
        assertEquals("", phone.message());
        phone.studio().say(Words.of(R.string.no_picker));
        shadowOf(Looper.getMainLooper()).idleFor(1, TimeUnit.HOURS);
        assertTrue(phone.shows(R.id.message));
    }

    @Test
    public void modelFilesOpenedInMidRunAreInstalledAfterwards() throws Exception {
        Gate gate = new Gate("unet");
        Phone phone = started(gate);
        byte[] file = phone.mvd();
        phone.openModel("first.mvd", file);
        phone.openModel("second.mvd", file);
        assertEquals("The file will be installed after this job.", phone.message());
        assertEquals("the run goes on", State.Work.RUNNING, phone.state().work());
        gate.open();
        phone.untilIdle();
        assertEquals(3, phone.state().models().size());
        assertEquals("second", phone.state().model().name());
        assertEquals("second is installed.", phone.message());
        assertNotNull("the clip stays", phone.state().result());
    }

    @Test
    public void aModelFileOpenedAtTheFirstStartIsInstalledAfterTheDemo() throws Exception {
        Phone phone = new Phone();
        phone.open();
        Intent view = new Intent(Intent.ACTION_VIEW, phone.content("other.mvd", phone.mvd()));
        Door unpacking = phone.openFirst(() -> Long.MAX_VALUE, view);
        phone.confirm();
        unpacking.open();
        phone.untilIdle();
        assertEquals(2, phone.state().models().size());
        assertEquals("other", phone.state().model().name());
    }

    @Test
    public void anErrorIsReadBeforeTheNextModelIsInstalled() throws Exception {
        Gate gate = new Gate("unet");
        Phone phone = started(gate);
        phone.openModel("other.mvd", phone.mvd());
        phone.memory(5_000_000);
        gate.open();
        phone.untilIdle();
        assertTrue(phone.message(), phone.message().contains("of memory"));
        assertEquals(1, phone.state().models().size());
        phone.click(R.id.message_close);
        phone.untilIdle();
        assertEquals("other is installed.", phone.message());
        assertEquals("lines of the failed run are gone", 0, phone.state().rows().size());
    }

    @Test
    public void aHostileModelFileIsRefused() throws Exception {
        Phone phone = new Phone();
        phone.open();
        ByteArrayOutputStream bytes = new ByteArrayOutputStream();
        try (ZipOutputStream zip = new ZipOutputStream(bytes)) {
            zip.putNextEntry(new ZipEntry("../../shared_prefs/settings.xml"));
        }
        phone.openModel("bad.mvd", bytes.toByteArray());
        phone.untilIdle();
        assertTrue(phone.message(), phone.message().contains("begins with ../../shared_prefs/settings.xml"));
        assertEquals(1, phone.state().models().size());
    }

    @Test
    public void aClipIsSavedOnceAndShared() throws Exception {
        Robolectric.setupContentProvider(FakeGallery.class, MediaStore.AUTHORITY);
        Phone phone = withClip();
        phone.click(R.id.save);
        phone.untilIdle();
        assertEquals("The clip is in your gallery, under Movies.", phone.message());
        assertEquals(1, FakeGallery.ENTRIES.size());
        Uri uri = FakeGallery.ENTRIES.keySet().iterator().next();
        ContentValues values = FakeGallery.ENTRIES.get(uri);
        assertEquals("mobilevd-1.mp4", values.getAsString(MediaStore.Video.Media.DISPLAY_NAME));
        assertEquals("Movies/MobileVD", values.getAsString(MediaStore.Video.Media.RELATIVE_PATH));
        assertEquals(0, (int) values.getAsInteger(MediaStore.Video.Media.IS_PENDING));
        assertArrayEquals(FILM, Files.readAllBytes(FakeGallery.file(uri).toPath()));

        phone.click(R.id.share);
        phone.untilIdle();
        assertEquals("it is not saved twice", 1, FakeGallery.ENTRIES.size());
        Intent chooser = shadowOf(phone.activity()).getNextStartedActivity();
        Intent send = chooser.getParcelableExtra(Intent.EXTRA_INTENT, Intent.class);
        assertEquals(Intent.ACTION_SEND, send.getAction());
        assertEquals(uri, send.getParcelableExtra(Intent.EXTRA_STREAM, Uri.class));
    }

    @Test
    public void aClipThatWasDeletedInTheGalleryIsSavedAgain() throws Exception {
        Robolectric.setupContentProvider(FakeGallery.class, MediaStore.AUTHORITY);
        Phone phone = withClip();
        phone.click(R.id.save);
        phone.untilIdle();
        assertFalse("it is there", phone.activity().findViewById(R.id.save).isEnabled());
        FakeGallery.ENTRIES.clear();
        phone.controller.pause().stop().start().resume();
        phone.until("that is noticed", () -> phone.activity().findViewById(R.id.save).isEnabled());
        phone.click(R.id.save);
        phone.untilIdle();
        assertEquals(1, FakeGallery.ENTRIES.size());
        FakeGallery.ENTRIES.clear();
        phone.click(R.id.share); // without a look at it in between
        phone.untilIdle();
        assertEquals(1, FakeGallery.ENTRIES.size());
    }

    @Test
    public void savingIsCancelled() throws Exception {
        Robolectric.setupContentProvider(FakeGallery.class, MediaStore.AUTHORITY);
        Phone phone = withClip();
        Door encoding = new Door();
        phone.studio()
                .encodeWith(
                        (clip, target, cancel) -> {
                            encoding.pass();
                            cancel.check();
                        });
        phone.click(R.id.save);
        phone.until("it is encoded", encoding::isReached);
        assertEquals("Cancel", phone.text(R.id.go));
        phone.click(R.id.go);
        encoding.open();
        phone.untilIdle();
        assertEquals("", phone.message());
        assertEquals(0, FakeGallery.ENTRIES.size());
    }

    @Test
    @Config(sdk = {28, 34})
    public void theFolderIsNamedWhereTheAppChoosesIt() throws Exception {
        Robolectric.setupContentProvider(FakeGallery.class, MediaStore.AUTHORITY);
        Phone phone = withClip();
        phone.studio().save(uri -> {});
        phone.untilIdle();
        assertEquals(Build.VERSION.SDK_INT >= 29, phone.message().endsWith("under Movies."));
        assertTrue(phone.message().startsWith("The clip is in your gallery"));
    }

    @Test
    public void aClipThatCannotBeSavedLeavesNothing() throws Exception {
        Robolectric.setupContentProvider(FakeGallery.class, MediaStore.AUTHORITY);
        Phone phone = withClip();
        phone.studio()
                .encodeWith(
                        (clip, target, cancel) -> {
                            throw new IOException("the encoder is busy");
                        });
        phone.click(R.id.save);
        phone.untilIdle();
        assertEquals("The clip cannot be saved: the encoder is busy", phone.message());
        assertEquals(0, FakeGallery.ENTRIES.size());
    }

    @Test
    @Config(sdk = 28)
    public void onAndroid9SavingAsksFirst() throws Exception {
        Robolectric.setupContentProvider(FakeGallery.class, MediaStore.AUTHORITY);
        Phone phone = withClip();
        phone.click(R.id.save);
        assertEquals(0, FakeGallery.ENTRIES.size());
        String[] asked = shadowOf(phone.activity()).getLastRequestedPermission().requestedPermissions;
        assertArrayEquals(new String[] {Manifest.permission.WRITE_EXTERNAL_STORAGE}, asked);
        int request = shadowOf(phone.activity()).getLastRequestedPermission().requestCode;
        phone.activity().onRequestPermissionsResult(request, asked, new int[] {PackageManager.PERMISSION_DENIED});
        phone.settle();
        assertTrue(phone.message(), phone.message().contains("needs your permission"));
        shadowOf(phone.app).grantPermissions(Manifest.permission.WRITE_EXTERNAL_STORAGE);
        phone.activity().onRequestPermissionsResult(request, asked, new int[] {PackageManager.PERMISSION_GRANTED});
        phone.untilIdle();
        assertEquals(1, FakeGallery.ENTRIES.size());
    }

    private static Phone started(Gate gate) throws IOException {
        Phone phone = new Phone();
        phone.restart(gate.runtimes());
        phone.open();
        phone.choosePicture();
        phone.click(R.id.go);
        phone.until("the run is at the gate", gate::isReached);
        phone.settle();
        return phone;
    }

    private static Phone withClip() throws IOException {
        Phone phone = new Phone();
        phone.studio()
                .encodeWith(
                        (clip, target, cancel) -> {
                            try (FileOutputStream out = new FileOutputStream(target)) {
                                out.write(FILM);
                            }
                        });
        phone.open();
        phone.choosePicture();
        phone.make();
        return phone;
    }

    private static Intent share(Uri picture) {
        return new Intent(Intent.ACTION_SEND).setType("image/png").putExtra(Intent.EXTRA_STREAM, picture);
    }

    private static View go(Phone phone) {
        return phone.activity().findViewById(R.id.go);
    }

    private static AnimationDrawable clip(Phone phone) {
        return (AnimationDrawable) ((ImageView) phone.activity().findViewById(R.id.picture)).getDrawable();
    }

    private static void type(Phone phone, String seed) {
        ((EditText) phone.activity().findViewById(R.id.seed)).setText(seed);
    }

    private static int hash(Result result, int frame) {
        return java.util.Arrays.hashCode(result.frames().get(frame));
    }
}
