// For those who open this folder in Android Studio. `make apk` does not need it; a test holds its versions to
// dependencies.toml, and kotlinc checks its types. To bundle an artifact, put its .mvd file (`mobilevd-deploy pack`)
// into app/assets/artifacts/.
plugins {
    id("com.android.application") version "9.5.0"
}

android {
    namespace = "dev.mobilevd.demo"
    compileSdk = 35

    defaultConfig {
        applicationId = "dev.mobilevd.demo"
        targetSdk = 35
        versionCode = 100
        versionName = "0.1.0"
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }

    flavorDimensions += "runtime"
    productFlavors {
        create("cpu") {
            dimension = "runtime"
            minSdk = 28
            ndk.abiFilters += listOf("arm64-v8a", "x86_64")
        }
        create("npu") {
            dimension = "runtime"
            minSdk = 31
            ndk.abiFilters += listOf("arm64-v8a")
        }
    }

    sourceSets {
        getByName("main") {
            java.srcDirs("core/src", "app/src")
            res.srcDirs("app/res")
            assets.srcDirs("app/assets")
            manifest.srcFile("app/AndroidManifest.xml")
        }
        getByName("cpu").manifest.srcFile("app/gradle/AndroidManifest.xml")
        getByName("npu").manifest.srcFile("app/gradle/AndroidManifest.xml")
    }

    // The DSP opens its libraries by path. The HTP compiler (90 MB) and the GPU have nothing to do here.
    packaging.jniLibs {
        useLegacyPackaging = true
        excludes += listOf("**/libQnnHtpPrepare.so", "**/libQnnGpu*.so", "**/libQnnDsp*.so", "**/libQnnCpu.so")
    }
}

dependencies {
    implementation("com.grack:nanojson:1.10")
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.29.0")
    "npuImplementation"("com.qualcomm.qti:onnxruntime-android-qnn:2.6.0")
    "npuImplementation"("com.qualcomm.qti:qnn-runtime:2.49.0")
}
