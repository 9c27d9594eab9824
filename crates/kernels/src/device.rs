//! Device names, as the command line spells them, and what this binary can make of them.

use std::panic::catch_unwind;

use burn::tensor::Device;

/// Every name `--device` understands; `N` is a device number and may be left out.
pub const DEVICE_NAMES: &str = "auto, cpu, cuda:N, rocm:N, vulkan:N, metal:N, tch:cpu, tch:cuda:N, tch:mps";

/// Why a device cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    /// Not a name of ours.
    #[error("device '{0}' is unknown; expected one of {DEVICE_NAMES}")]
    Unknown(String),
    /// A backend that this binary was built without.
    #[error(
        "device '{name}' is not in this binary; build it with `cargo build --release --features {feature}`, \
         or choose one that `pronk devices` lists"
    )]
    NotCompiledIn {
        /// The device asked for.
        name: String,
        /// The Cargo feature that brings it.
        feature: &'static str,
    },
    /// The backend's driver library is missing.
    #[error("device '{name}' needs the library {library}, which this machine does not have; {remedy}")]
    MissingLibrary {
        /// The device asked for.
        name: String,
        /// The library's file name.
        library: &'static str,
        /// Where it comes from.
        remedy: &'static str,
    },
    /// The backend works, the device is not there.
    #[error("device '{name}' is not there: found {found} {backend} device(s); `pronk devices` lists them")]
    NotThere {
        /// The device asked for.
        name: String,
        /// The backend's name.
        backend: &'static str,
        /// How many devices it sees.
        found: usize,
    },
}

/// One backend: how its devices are called, what brings it, and how its devices are found.
struct Backend {
    name: &'static str,
    feature: &'static str,
    compiled_in: bool,
    /// The driver library and where it comes from, for backends that load one at run time.
    library: Option<(&'static str, &'static str)>,
    devices: fn() -> Vec<Device>,
}

/// In the order in which `auto` tries them: graphics cards first. `cube-cpu` is for tests of what runs
/// on cards, and known only where it is built in.
const BACKENDS: &[Backend] = &[
    Backend {
        name: "cuda",
        feature: "cuda",
        compiled_in: cfg!(feature = "cuda"),
        library: Some(("libcuda.so.1", "install NVIDIA's driver")),
        devices: cuda,
    },
    Backend {
        name: "rocm",
        feature: "rocm",
        compiled_in: cfg!(feature = "rocm"),
        library: Some(("libamdhip64.so", "install AMD's ROCm")),
        devices: rocm,
    },
    Backend {
        name: "metal",
        feature: "metal",
        compiled_in: cfg!(feature = "metal"),
        library: None,
        devices: metal,
    },
    Backend {
        name: "vulkan",
        feature: "vulkan",
        compiled_in: cfg!(feature = "vulkan"),
        library: Some(("libvulkan.so.1", "install a Vulkan driver (on Debian: mesa-vulkan-drivers)")),
        devices: vulkan,
    },
    Backend {
        name: "tch:cuda",
        feature: "tch",
        compiled_in: cfg!(feature = "tch"),
        library: None,
        devices: tch_cuda,
    },
    Backend {
        name: "tch:mps",
        feature: "tch",
        compiled_in: cfg!(feature = "tch"),
        library: None,
        devices: tch_mps,
    },
    Backend {
        name: "cpu",
        feature: "flex",
        compiled_in: cfg!(feature = "flex"),
        library: None,
        devices: flex,
    },
    Backend {
        name: "tch:cpu",
        feature: "tch",
        compiled_in: cfg!(feature = "tch"),
        library: None,
        devices: tch_cpu,
    },
    #[cfg(feature = "cubecl-cpu")]
    Backend {
        name: "cube-cpu",
        feature: "cubecl-cpu",
        compiled_in: true,
        library: None,
        devices: || vec![Device::cpu()],
    },
];

impl Backend {
    /// The devices that are there, or why there are none.
    fn find(&self, name: &str) -> Result<Vec<Device>, DeviceError> {
        if !self.compiled_in {
            return Err(DeviceError::NotCompiledIn { name: name.into(), feature: self.feature });
        }
        if let Some((library, remedy)) = self.library
            && !loads(library)
        {
            return Err(DeviceError::MissingLibrary { name: name.into(), library, remedy });
        }
        // A driver without a card makes some runtimes panic where they look for devices.
        Ok(catch_unwind(self.devices).unwrap_or_default())
    }
}

/// Opens the device called `name`; see [`DEVICE_NAMES`].
pub fn open_device(name: &str) -> Result<Device, DeviceError> {
    if name == "auto" {
        let first = BACKENDS.iter().find_map(|backend| backend.find(name).ok()?.into_iter().next());
        return first.ok_or(DeviceError::NotCompiledIn { name: name.into(), feature: "flex" });
    }
    let unknown = || DeviceError::Unknown(name.to_owned());
    let (backend, index) = match name.rsplit_once(':') {
        Some((head, digits)) if BACKENDS.iter().any(|b| b.name == head) => {
            (head, digits.parse::<usize>().map_err(|_| unknown())?)
        }
        _ => (name, 0),
    };
    let backend = BACKENDS.iter().find(|b| b.name == backend).ok_or_else(unknown)?;
    let mut devices = backend.find(name)?;
    if index >= devices.len() {
        let found = devices.len();
        return Err(DeviceError::NotThere { name: name.into(), backend: backend.name, found });
    }
    Ok(devices.swap_remove(index))
}

/// Whether `device` is this machine's processor, so that its tensors lie in host memory.
pub fn computes_on_host(device: &Device) -> bool {
    let host = [flex(), tch_cpu()].concat();
    host.contains(&device.clone().without_autodiff())
}

/// Every backend by name, with its devices' names or the reason why it has none.
pub fn available_devices() -> Vec<(&'static str, Result<Vec<String>, DeviceError>)> {
    BACKENDS
        .iter()
        .map(|backend| {
            let names = |n: usize| match n {
                1 if backend.name.ends_with("cpu") || backend.name.ends_with("mps") => {
                    vec![backend.name.to_owned()]
                }
                n => (0..n).map(|i| format!("{}:{i}", backend.name)).collect(),
            };
            (backend.name, backend.find(backend.name).map(|devices| names(devices.len())))
        })
        .collect()
}

/// Every device that is there and can be opened, with its name.
pub fn open_devices() -> Vec<(String, Device)> {
    let names = available_devices().into_iter().filter_map(|(_, found)| found.ok()).flatten();
    names.filter_map(|name| open_device(&name).ok().map(|device| (name, device))).collect()
}

fn loads(library: &str) -> bool {
    // SAFETY: loading runs the library's initializers. It is the vendor's driver, which the
    // backend itself loads by the same name as soon as a device is opened.
    #[allow(unsafe_code)]
    unsafe {
        libloading::Library::new(library).is_ok()
    }
}

/// A finder for a backend behind a Cargo feature; without the feature it finds nothing.
macro_rules! finder {
    ($name:ident, $feature:literal, $devices:expr) => {
        #[cfg(feature = $feature)]
        fn $name() -> Vec<Device> {
            $devices
        }
        #[cfg(not(feature = $feature))]
        fn $name() -> Vec<Device> {
            Vec::new()
        }
    };
}
finder!(cuda, "cuda", Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec());
finder!(rocm, "rocm", Device::enumerate(burn::tensor::DeviceType::Rocm).into_vec());
finder!(metal, "metal", Device::enumerate(burn::tensor::DeviceType::Metal).into_vec());
finder!(vulkan, "vulkan", Device::enumerate(burn::tensor::DeviceType::Vulkan).into_vec());
finder!(tch_cuda, "tch", Device::enumerate(burn::tensor::DeviceType::LibTorch).into_vec());
finder!(tch_mps, "tch", if cfg!(target_os = "macos") { vec![Device::libtorch_mps()] } else { Vec::new() });
finder!(flex, "flex", vec![Device::flex()]);
finder!(tch_cpu, "tch", {
    // What takes long runs on threads of our own. LibTorch's would spin between its small
    // operations, and take the cores from them: twice the processor time for the same step.
    tch::set_num_threads(1);
    vec![Device::libtorch()]
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        assert_eq!(open_device("cpuu").unwrap_err(), DeviceError::Unknown("cpuu".into()));
        assert_eq!(open_device("cuda:x").unwrap_err(), DeviceError::Unknown("cuda:x".into()));
        assert!(matches!(open_device("cuda:7"), Err(e) if e.to_string().contains("cuda")));
        #[cfg(feature = "flex")]
        {
            assert!(open_device("auto").is_ok());
            assert!(open_device("cpu").is_ok());
            assert!(matches!(open_device("cpu:1"), Err(DeviceError::NotThere { found: 1, .. })));
        }
    }

    #[test]
    fn a_backend_left_out_names_its_feature() {
        #[cfg(not(feature = "rocm"))]
        assert!(open_device("rocm").unwrap_err().to_string().contains("--features rocm"));
    }
}
