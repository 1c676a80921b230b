//! The words behind the plugin's path in plugstack.conf, as `key=value`. Pure; an unknown or bad
//! word makes the whole line refused, so that a typo does not quietly mean the default.

use crate::options::{IMAGE, OPTIONS};

/// Where the helper is when plugstack.conf does not say.
const HELPER: &str = "/usr/bin/container-checkpoint";

const ALLOWED: &str = "allowed are helper=PATH and config=PATH, absolute paths, \
preflight=off|warn|fail, and image-option=NAME, the name to use instead of container-image";

#[derive(Debug, PartialEq, Eq)]
pub struct Settings {
    /// The helper's absolute path on the nodes.
    pub helper: Vec<u8>,
    /// Path of the helper's configuration; its own default where None.
    pub config: Option<Vec<u8>>,
    /// What `--container-image` is called here.
    pub image_option: String,
    /// Whether submissions are checked, `warn` or `fail`; None: they are not.
    pub preflight: Option<&'static str>,
    /// Why the line is refused.
    pub fault: Option<String>,
    /// The callback that panics, for tests.
    #[cfg(feature = "fault-points")]
    pub panic_in: Vec<u8>,
}

impl Settings {
    /// Reads all words; of a refused line the good ones still count.
    pub fn new<'a>(words: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut settings = Self {
            helper: HELPER.into(),
            config: None,
            image_option: OPTIONS[IMAGE].name.to_owned(),
            preflight: None,
            fault: None,
            #[cfg(feature = "fault-points")]
            panic_in: Vec::new(),
        };
        for word in words {
            if let Err(what) = settings.take(word) {
                let word = String::from_utf8_lossy(word);
                settings.fault = Some(format!(
                    "plugstack.conf: {what} {word} behind the plugin's path: {ALLOWED}"
                ));
            }
        }
        settings
    }

    /// Takes a word; the error is what is wrong with it.
    fn take(&mut self, word: &[u8]) -> Result<(), &'static str> {
        const UNKNOWN: &str = "unknown word";
        let at = word.iter().position(|byte| *byte == b'=').ok_or(UNKNOWN)?;
        let (key, value) = (&word[..at], &word[at + 1..]);
        match key {
            b"helper" if value.starts_with(b"/") => self.helper = value.to_vec(),
            b"config" if value.starts_with(b"/") => self.config = Some(value.to_vec()),
            b"preflight" if value == b"off" => self.preflight = None,
            b"preflight" if value == b"warn" => self.preflight = Some("warn"),
            b"preflight" if value == b"fail" => self.preflight = Some("fail"),
            b"image-option" if is_option_name(value) => {
                self.image_option = String::from_utf8_lossy(value).into_owned();
            }
            #[cfg(feature = "fault-points")]
            b"panic" => self.panic_in = value.to_vec(),
            b"helper" | b"config" | b"image-option" | b"preflight" => {
                return Err("bad value in the word");
            }
            _ => return Err(UNKNOWN),
        }
        Ok(())
    }

    /// What the option at `index` of [`OPTIONS`] is called here.
    pub fn option_name(&self, index: usize) -> &str {
        match OPTIONS.get(index) {
            _ if index == IMAGE => &self.image_option,
            Some(option) => option.name,
            None => "",
        }
    }
}

/// Whether an option may be called so: as Slurm's own are, and none of ours.
fn is_option_name(name: &[u8]) -> bool {
    let ours = || {
        let mut others = OPTIONS
            .iter()
            .enumerate()
            .filter(|(index, _)| *index != IMAGE);
        others.any(|(_, option)| option.name.as_bytes() == name)
    };
    let byte_fits = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
    (2..=75).contains(&name.len())
        && name.iter().all(byte_fits)
        && name[0].is_ascii_lowercase()
        && !ours()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(words: &[&str]) -> Settings {
        Settings::new(words.iter().map(|word| word.as_bytes()))
    }

    #[test]
    fn no_words_mean_the_defaults() {
        let settings = settings(&[]);
        assert_eq!(settings.helper, HELPER.as_bytes());
        assert_eq!((settings.config, settings.fault), (None, None));
        assert_eq!(settings.image_option, "container-image");
    }

    #[test]
    fn words_are_taken() {
        let settings = settings(&[
            "helper=/opt/cc",
            "config=/etc/cc.yaml",
            "image-option=resumable-image",
            "preflight=warn",
            "preflight=fail",
        ]);
        assert_eq!(settings.preflight, Some("fail"));
        assert_eq!(settings.helper, b"/opt/cc");
        assert_eq!(settings.config.as_deref(), Some(&b"/etc/cc.yaml"[..]));
        assert_eq!(settings.option_name(IMAGE), "resumable-image");
        assert_eq!(settings.option_name(0), "container-checkpoint");
        assert_eq!(settings.fault, None);
    }

    #[test]
    fn bad_words_are_refused_by_name() {
        for (bad, what) in [
            ("", "unknown word  behind"),
            ("helper", "unknown word helper behind"),
            ("=", "unknown word = behind"),
            ("Helper=/x", "unknown word Helper=/x behind"),
            ("default=x", "unknown word default=x behind"),
            ("helper=", "bad value in the word helper= behind"),
            (
                "helper=bin/cc",
                "bad value in the word helper=bin/cc behind",
            ),
            ("config=", "bad value in the word config= behind"),
            ("preflight=", "bad value in the word preflight= behind"),
            ("preflight=on", "bad value in the word preflight=on behind"),
            (
                "image-option=",
                "bad value in the word image-option= behind",
            ),
            (
                "image-option=--x",
                "bad value in the word image-option=--x behind",
            ),
            (
                "image-option=a b",
                "bad value in the word image-option=a b behind",
            ),
            (
                "image-option=container-checkpoint",
                "bad value in the word image-option=container-checkpoint behind",
            ),
        ] {
            let fault = settings(&["config=/c", bad]).fault.unwrap_or_default();
            let start = format!("plugstack.conf: {what} the plugin's path: allowed are helper=");
            assert!(fault.starts_with(&start), "{bad}: {fault}");
        }
    }
}
