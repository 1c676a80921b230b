//! As much of protobuf's encoding (protobuf.dev, "Encoding") as CRIU's files and its request socket
//! need. There is no code generator at work: we need a handful of fields.
//!
//! Contract: hostile bytes give an error, never a panic.

/// The fields of a protobuf message (protobuf.dev, "Encoding").
pub struct Fields<'a>(pub &'a [u8]);

pub enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.take();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn take(&mut self) -> Result<(u64, Value<'a>), String> {
        let key = varint(&mut self.0)?;
        let value = match key & 7 {
            0 => Value::Number(varint(&mut self.0)?),
            1 => Value::Bytes(self.bytes(8)?),
            2 => {
                let size = varint(&mut self.0)?;
                Value::Bytes(self.bytes(size)?)
            }
            5 => Value::Bytes(self.bytes(4)?),
            other => return Err(format!("a field has the unknown type {other}")),
        };
        Ok((key >> 3, value))
    }

    fn bytes(&mut self, size: u64) -> Result<&'a [u8], String> {
        let size = usize::try_from(size).map_err(|_| "a field is cut short")?;
        let (bytes, rest) = self
            .0
            .split_at_checked(size)
            .ok_or("a field is cut short")?;
        self.0 = rest;
        Ok(bytes)
    }
}

pub fn varint(bytes: &mut &[u8]) -> Result<u64, String> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or("a number is cut short")?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err("a number is too long".into())
}

/// The number in field `which` of a message; the last one if there are several.
pub fn number(message: &[u8], which: u64) -> Result<Option<u64>, String> {
    let mut found = None;
    for field in Fields(message) {
        if let (field, Value::Number(number)) = field?
            && field == which
        {
            found = Some(number);
        }
    }
    Ok(found)
}

/// The bytes in field `which` of a message: a message of its own, or a string.
pub fn message(message: &[u8], which: u64) -> Result<Option<&[u8]>, String> {
    let mut found = None;
    for field in Fields(message) {
        if let (field, Value::Bytes(bytes)) = field?
            && field == which
        {
            found = Some(bytes);
        }
    }
    Ok(found)
}

/// Adds a field that holds a number.
pub fn put_number(message: &mut Vec<u8>, which: u64, value: u64) {
    put_varint(message, which << 3);
    put_varint(message, value);
}

/// Adds a field that holds bytes: a message of its own, or a string.
pub fn put_bytes(message: &mut Vec<u8>, which: u64, value: &[u8]) {
    put_varint(message, which << 3 | 2);
    put_varint(message, value.len() as u64);
    message.extend_from_slice(value);
}

fn put_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_was_put_is_found() {
        let mut inner = Vec::new();
        put_number(&mut inner, 1, 300);
        let mut outer = Vec::new();
        put_number(&mut outer, 67, u64::MAX);
        put_bytes(&mut outer, 2, &inner);
        assert_eq!(Ok(Some(u64::MAX)), number(&outer, 67));
        let found = message(&outer, 2).unwrap().unwrap();
        assert_eq!(Ok(Some(300)), number(found, 1));
        assert_eq!(Ok(None), number(&outer, 1));
        assert!(number(&outer[..outer.len() - 1], 67).is_err());
    }

    proptest! {
        #[test]
        fn anything_can_be_read(bytes: Vec<u8>) {
            let fields = Fields(&bytes).count();
            prop_assert!(fields <= bytes.len());
        }
    }
}
