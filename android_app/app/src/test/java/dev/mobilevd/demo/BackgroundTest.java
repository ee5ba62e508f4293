package dev.mobilevd.demo;

import static org.junit.Assert.assertEquals;
import static org.junit.Assert.assertFalse;
import static org.junit.Assert.assertNotNull;
import static org.junit.Assert.assertNull;
import static org.junit.Assert.assertTrue;
import static org.robolectric.Shadows.shadowOf;

import android.app.Notification;
import android.content.ComponentName;
import android.content.Intent;
import android.content.pm.ServiceInfo;
import dev.mobilevd.core.Runtimes;
import java.nio.file.Files;
import java.nio.file.Path;
import org.junit.Before;
import org.junit.Test;
import org.junit.runner.RunWith;
import org.robolectric.Robolectric;
import org.robolectric.RobolectricTestRunner;
import org.robolectric.android.controller.ServiceController;
import org.robolectric.annotation.Config;
import org.robolectric.annotation.GraphicsMode;

/** A run while the app is in the background. */
@RunWith(RobolectricTestRunner.class)
@GraphicsMode(GraphicsMode.Mode.NATIVE)
@Config(sdk = 34, qualifiers = "w411dp-h891dp-mdpi")
public final class BackgroundTest {
    private final Gate gate = new Gate("unet");
    private Phone phone;

    @Before
    public void start() throws Exception {
        phone = new Phone();
        phone.restart(gate.runtimes());
        phone.open();
        phone.choosePicture();
    }

    @Test
    public void aRunHasAServiceOfTheRightType() throws Exception {
        ServiceInfo info =
                phone.app.getPackageManager().getServiceInfo(new ComponentName(phone.app, RunService.class), 0);
        assertFalse(info.exported);
        assertEquals(ServiceInfo.FOREGROUND_SERVICE_TYPE_SHORT_SERVICE, info.getForegroundServiceType());
        run();
        Intent started = shadowOf(phone.app).getNextStartedService();
        assertEquals(RunService.class.getName(), started.getComponent().getClassName());
        ServiceController<RunService> service = Robolectric.buildService(RunService.class, started);
        service.create().startCommand(0, 1);
        Notification notification = shadowOf(service.get()).getLastForegroundNotification();
        assertEquals("Generating a clip", notification.extras.getString(Notification.EXTRA_TITLE));
        phone.controller.pause().stop();
        assertFalse("it goes on", phone.state().job().isCancelling());
        gate.open();
        phone.untilIdle();
        assertTrue("the service ends with the run", shadowOf(service.get()).isStoppedBySelf());
        assertNotNull(phone.state().clip());
    }

    @Test
    public void theNotificationCancels() {
        run();
        ServiceController<RunService> service = service(shadowOf(phone.app).getNextStartedService());
        Notification notification = shadowOf(service.get()).getLastForegroundNotification();
        Intent cancel = shadowOf(notification.actions[0].actionIntent).getSavedIntent();
        service.get().onStartCommand(cancel, 0, 2);
        assertTrue(phone.state().job().isCancelling());
        gate.open();
        phone.untilIdle();
        assertNull(phone.state().clip());
    }

    @Test
    public void aServiceThatStartsAfterTheRunStops() {
        run();
        Intent started = shadowOf(phone.app).getNextStartedService();
        gate.open();
        phone.untilIdle();
        ServiceController<RunService> service = service(started);
        assertNotNull(shadowOf(service.get()).getLastForegroundNotification());
        assertTrue(shadowOf(service.get()).isStoppedBySelf());
    }

    @Test
    public void theEndOfItsTimeStopsTheRunVisibly() {
        run();
        ServiceController<RunService> service = service(shadowOf(phone.app).getNextStartedService());
        service.get().onTimeout(1);
        assertTrue(shadowOf(service.get()).isStoppedBySelf());
        gate.open();
        phone.untilIdle();
        assertTrue(phone.message(), phone.message().startsWith("The run was stopped"));
        assertNull("no time that contains a freeze is shown", phone.state().clip());
    }

    @Test
    public void withoutAServiceTheRunStopsVisibly() {
        Runtimes runtimes = gate.runtimes();
        phone.app.start(
                new Device(phone.app) {
                    @Override
                    synchronized Runtimes runtimes() {
                        return runtimes;
                    }

                    @Override
                    boolean startRunService() {
                        return false;
                    }
                });
        phone.open();
        phone.until("the picture is back", () -> phone.state().canRun());
        run();
        phone.controller.recreate();
        phone.settle();
        assertFalse("a turn of the phone is no end", phone.state().job().isCancelling());
        phone.controller.pause().stop();
        gate.open();
        phone.untilIdle();
        phone.controller.start().resume();
        assertTrue(phone.message(), phone.message().startsWith("The run was stopped"));
    }

    @Test
    public void whatAKilledProcessLeftIsDeletedButNotWhatAdbCopies() throws Exception {
        Path artifacts = phone.modelFolder().getParent();
        for (String name : new String[] {".a.installing", ".b.deleted", ".c.partial"}) {
            Files.createDirectories(artifacts.resolve(name).resolve("unet"));
            Files.write(artifacts.resolve(name).resolve("unet/model.onnx"), new byte[10]);
        }
        Path picture = phone.app.getNoBackupFilesDir().toPath().resolve("picture123.partial");
        Files.write(picture, new byte[10]);
        phone.restart();
        phone.open();
        phone.until("it is swept", () -> Files.notExists(artifacts.resolve(".a.installing")));
        phone.until("it is swept", () -> Files.notExists(artifacts.resolve(".b.deleted")) && Files.notExists(picture));
        assertTrue(Files.exists(artifacts.resolve(".c.partial/unet/model.onnx")));
        assertEquals(1, phone.state().models().size());
    }

    private void run() {
        phone.click(R.id.go);
        phone.until("the run waits", gate::isReached);
    }

    private static ServiceController<RunService> service(Intent intent) {
        return Robolectric.buildService(RunService.class, intent).create().startCommand(0, 1);
    }
}
