// Plain Java without Android: artifacts, the pipeline, ONNX Runtime. Its tests run on the desktop.
plugins {
    `java-library`
}

java {
    sourceCompatibility = JavaVersion.VERSION_17
    targetCompatibility = JavaVersion.VERSION_17
}

dependencies {
    implementation(libs.nanojson)
    // The app provides the Android build of the same Java API.
    compileOnly(libs.onnxruntime.jvm)
    testImplementation(libs.onnxruntime.jvm)
    testImplementation(libs.junit)
}
