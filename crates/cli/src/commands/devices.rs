use std::fmt::Write;

use pronk_kernels::{DeviceError, available_devices};

use crate::terminal::print;

/// `pronk devices`
pub fn run() {
    let mut table = String::from("backend    devices\n");
    for (name, found) in available_devices() {
        let state = match found {
            Ok(devices) if devices.is_empty() => "in this binary; no device found".to_owned(),
            Ok(devices) => devices.join(", "),
            Err(DeviceError::NotCompiledIn { feature, .. }) => {
                format!("not in this binary (Cargo feature {feature})")
            }
            Err(e) => e.to_string(),
        };
        let _ = writeln!(table, "{name:<10} {state}");
    }
    print(&table);
}
