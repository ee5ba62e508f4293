package dev.mobilevd.demo;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertNotNull;
import static org.junit.Assert.assertNull;
import static org.junit.Assert.assertTrue;
import static org.robolectric.Shadows.shadowOf;

import android.app.AlertDialog;
import android.content.Intent;
import android.graphics.Rect;
import android.net.Uri;
import android.os.Looper;
import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import org.junit.Before;
import org.junit.Test;
import org.junit.runner.RunWith;
import org.robolectric.RobolectricTestRunner;
import org.robolectric.annotation.Config;
import org.robolectric.annotation.GraphicsMode;
import org.robolectric.shadows.ShadowPopupMenu;

/** Intents and streams of other apps, which this app does not trust. */
@RunWith(RobolectricTestRunner.class)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
@Config(sdk = 34, qualifiers = "w411dp-h891dp-mdpi")
public final class OtherAppsTest {
    private Phone phone;

    @Before
    public void open() {
        phone = new Phone();
        phone.open();
    }

    @Test
    public void nothingIsInstalledBeforeTheAnswer() throws Exception {
        byte[] file = phone.mvd();
        Path model = phone.modelFolder();
        Object before = Files.getLastModifiedTime(model.resolve("manifest.json"));
        view("demo.mvd", file);
        AlertDialog question = phone.question();
        assertTrue(question.isShowing());
        String text = shadowOf(question).getMessage().toString();
        assertTrue(text, text.contains("replaces the installed model demo"));
        assertTrue(text, text.contains("Source: files"));
        assertTrue(text, text.contains("Size: unknown"));
        assertEquals(State.Work.NONE, phone.state().work());
        question.getButton(AlertDialog.BUTTON_NEGATIVE).performClick();
        phone.settle();
        assertFalse(question.isShowing());
        assertEquals(0, phone.state().offers().size());
        assertEquals(before, Files.getLastModifiedTime(model.resolve("manifest.json")));
    }

    @Test
    public void theQuestionSurvivesTheTurnOfThePhone() throws Exception {
        view("other.mvd", phone.mvd());
        AlertDialog before = phone.question();
        phone.controller.recreate();
        phone.settle();
        assertFalse(before.isShowing());
        assertTrue(phone.question().isShowing());
        phone.confirm();
        phone.untilIdle();
        assertEquals("other", phone.state().modelName());
    }

    @Test
    public void aStreamWithoutEndIsRefusedAndBlocksNothing() throws Exception {
        phone.choosePicture();
        send(
                new InputStream() {
                    @Override
                    public int read() {
                        return 0;
                    }

                    @Override
                    public int read(byte[] buffer, int offset, int length) {
                        return length;
                    }
                });
        phone.until("it is refused", () -> phone.state().message() != null);
        assertEquals("The picture has more than 128 MB.", phone.message());
        assertNotNull(phone.state().picture());
        phone.make();
        assertNotNull(phone.state().clip());
    }

    @Test
    public void aStreamThatNeverAnswersCanBeCancelledAndBlocksNoRun() throws Exception {
        phone.choosePicture();
        Stuck stuck = new Stuck();
        send(stuck);
        shadowOf(Looper.getMainLooper()).idleFor(1500, TimeUnit.MILLISECONDS);
        assertEquals("Reading the picture …", phone.message());
        phone.click(R.id.snackbar_action);
        assertEquals("", phone.message());
        assertTrue("its stream is closed", stuck.closed.await(10, TimeUnit.SECONDS));
        send(new Stuck());
        phone.make();
        assertNotNull(phone.state().clip());
    }

    @Test
    public void theNextPictureReplacesOneThatIsBeingRead() throws Exception {
        Stuck stuck = new Stuck();
        send(stuck);
        phone.studio().usePicture(phone.picture());
        phone.until("the next one is read", () -> phone.state().picture() != null);
        assertTrue(stuck.closed.await(10, TimeUnit.SECONDS));
        assertEquals("", phone.message());
    }

    @Test
    public void anInstallationThatWaitsForTheOtherAppIsCancelled() throws Exception {
        Uri uri = Uri.parse("content://files/slow.mvd");
        Stuck stuck = new Stuck();
        shadowOf(phone.app.getContentResolver()).registerInputStreamSupplier(uri, () -> stuck);
        phone.controller.newIntent(new Intent(Intent.ACTION_VIEW, uri));
        phone.confirm();
        phone.until("it is being read", () -> stuck.reading.getCount() == 0);
        phone.click(R.id.go);
        phone.untilIdle();
        assertEquals("", phone.message());
        assertEquals(1, phone.state().models().size());
    }

    @Test
    public void anotherKindOfStreamIsNoCrash() {
        Intent intent = new Intent(Intent.ACTION_SEND).setType("image/png");
        phone.controller.newIntent(intent.putExtra(Intent.EXTRA_STREAM, new Rect(1, 2, 3, 4)));
        assertTrue(phone.message(), phone.message().startsWith("This picture cannot be read"));
        assertNull(phone.state().picture());
    }

    @Test
    @Config(sdk = {28, 34})
    public void aFileManagersFileOpensWithThisApp() {
        for (String[] file :
                new String[][] {
                    {"content://files/model.mvd", "video/unknown"},
                    {"content://files/My.model.v2.mvd", "video/unknown"},
                    {"content://files/sd.card/1.0/model.mvd", "video/unknown"},
                    {"content://com.android.providers.downloads.documents/document/1234", "application/octet-stream"},
                    {"content://com.android.providers.downloads.documents/document/1234", "application/zip"},
                }) {
            assertEquals(file[0] + " " + file[1], 1, handlers(file[0], file[1]));
        }
        assertEquals(0, handlers("content://files/picture.mvd.png", "image/png"));
    }

    private int handlers(String address, String type) {
        Intent view = new Intent(Intent.ACTION_VIEW).setDataAndType(Uri.parse(address), type);
        return phone.app.getPackageManager().queryIntentActivities(view, 0).size();
    }

    @Test
    public void aModelIsDeletedAfterAQuestion() throws Exception {
        phone.click(R.id.more);
        ShadowPopupMenu.getLatestPopupMenu().getMenu().performIdentifierAction(R.string.remove_model, 0);
        phone.settle();
        assertEquals("Delete demo · 23 MB?", shadowOf(phone.question()).getTitle().toString());
        assertEquals(1, phone.state().models().size());
        phone.question().getButton(AlertDialog.BUTTON_POSITIVE).performClick();
        phone.until("it is deleted", () -> phone.state().models().isEmpty());
    }

    @Test
    public void aDamagedModelIsDeletedAndTheApksIsInstalledAgain() throws Exception {
        Files.write(phone.modelFolder().resolve("unet/model.onnx.data"), new byte[10]);
        phone.studio().refresh();
        phone.until("the loss is noticed", () -> phone.state().manifest() == null);
        assertTrue(phone.shows(R.id.delete));
        phone.click(R.id.delete);
        phone.question().getButton(AlertDialog.BUTTON_POSITIVE).performClick();
        phone.until("it is whole again", () -> phone.state().manifest() != null);
        phone.untilIdle();
        assertFalse(phone.shows(R.id.delete));
    }

    private void view(String name, byte[] bytes) {
        phone.controller.newIntent(new Intent(Intent.ACTION_VIEW, phone.content(name, bytes)));
        phone.until("the question is asked", () -> !phone.state().offers().isEmpty());
    }

    private void send(InputStream stream) {
        Uri uri = Uri.parse("content://photos/1");
        shadowOf(phone.app.getContentResolver()).registerInputStreamSupplier(uri, () -> stream);
        phone.controller.newIntent(
                new Intent(Intent.ACTION_SEND).setType("image/png").putExtra(Intent.EXTRA_STREAM, uri));
    }

    /** Gives nothing until it is closed, as a pipe whose writer sleeps. */
    private static final class Stuck extends InputStream {
        final CountDownLatch reading = new CountDownLatch(1);
        final CountDownLatch closed = new CountDownLatch(1);

        @Override
        public int read() throws IOException {
            reading.countDown();
            try {
                closed.await();
            } catch (InterruptedException error) {
                throw new IOException(error);
            }
            throw new IOException("closed");
        }

        @Override
        public void close() {
            closed.countDown();
        }
    }
}
