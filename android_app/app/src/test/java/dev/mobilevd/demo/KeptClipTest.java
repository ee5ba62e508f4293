package dev.mobilevd.demo;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertNotNull;
import static org.junit.Assert.assertNull;
import static org.junit.Assert.assertSame;
import static org.junit.Assert.assertTrue;

import android.app.AlertDialog;
import android.graphics.drawable.AnimationDrawable;
import android.widget.ImageView;
import java.util.Arrays;
import org.junit.Before;
import org.junit.Test;
import org.junit.runner.RunWith;
import org.robolectric.RobolectricTestRunner;
import org.robolectric.annotation.Config;
import org.robolectric.annotation.GraphicsMode;
import org.robolectric.shadows.ShadowDialog;

/** The last clip stays until the next one is made. */
@RunWith(RobolectricTestRunner.class)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
@Config(sdk = 34, qualifiers = "w411dp-h891dp-mdpi")
public final class KeptClipTest {
    private Phone phone;
    private Result clip;

    @Before
    public void makeClip() throws Exception {
        phone = new Phone();
        phone.open();
        phone.choosePicture();
        phone.make();
        clip = phone.state().result();
    }

    @Test
    public void aCancelledRunKeepsIt() throws Exception {
        Gate gate = new Gate("unet");
        phone.restart(gate.runtimes());
        phone.open();
        phone.until("the clip is back", () -> phone.state().clip() != null);
        phone.click(R.id.go);
        phone.until("the run waits", gate::isReached);
        assertNull("the picture is shown meanwhile", phone.state().clip());
        assertFalse(phone.shows(R.id.take_away));
        phone.click(R.id.go);
        gate.open();
        phone.untilIdle();
        assertShown();
        phone.restart();
        phone.open();
        phone.until("the clip is back", () -> phone.state().clip() != null);
        assertShown();
    }

    @Test
    public void aFailedRunKeepsIt() {
        phone.memory(5_000_000);
        phone.make();
        assertTrue(phone.message(), phone.message().contains("of memory"));
        assertShown();
        assertSame(clip, phone.state().result());
    }

    @Test
    public void theChoiceOfAModelKeepsIt() {
        phone.click(R.id.model);
        AlertDialog dialog = (AlertDialog) ShadowDialog.getLatestDialog();
        dialog.getListView().performItemClick(dialog.getListView().getChildAt(0), 0, 0);
        phone.settle();
        assertShown();
    }

    @Test
    public void aNewPictureHidesItOnly() throws Exception {
        phone.studio().usePicture(phone.picture());
        phone.until("the picture is shown", () -> phone.state().clip() == null);
        assertFalse(phone.shows(R.id.take_away));
        phone.restart();
        phone.open();
        phone.until("all is back", () -> phone.state().picture() != null);
        assertNull("the picture is newer", phone.state().clip());
        phone.studio().showClip();
        phone.settle();
        assertShown();
    }

    private void assertShown() {
        assertNotNull(phone.state().clip());
        assertTrue(phone.shows(R.id.take_away));
        assertTrue(phone.text(R.id.headline), phone.text(R.id.headline).startsWith("Ran on the CPU"));
        assertEquals(4, phone.state().clip().rows().size());
        assertTrue(Arrays.equals(clip.frames().get(13), phone.state().clip().frames().get(13)));
        ImageView picture = phone.activity().findViewById(R.id.picture);
        assertTrue(picture.getDrawable() instanceof AnimationDrawable);
    }
}
