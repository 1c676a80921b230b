//! Sockets that listen, as the kernel shows them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

/// A socket that listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    pub address: SocketAddr,
    /// The user's id.
    pub user: u32,
    pub inode: u64,
}

/// Those in the text of /proc/net/tcp or tcp6 (proc_pid_net(5)): addresses are hexadecimal words in the
/// machine's order.
pub fn listeners(text: &str) -> impl Iterator<Item = Listener> {
    const LISTEN: &str = "0A";
    text.lines().skip(1).filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if *fields.get(3)? != LISTEN {
            return None;
        }
        let (address, port) = fields.get(1)?.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        Some(Listener {
            address: SocketAddr::new(address_of(address)?, port),
            user: fields.get(7)?.parse().ok()?,
            inode: fields.get(9)?.parse().ok()?,
        })
    })
}

/// The inode of the socket to which an entry of /proc/PID/fd is a link.
pub fn socket_inode(link: &Path) -> Option<u64> {
    let text = link.to_str()?;
    text.strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

fn address_of(text: &str) -> Option<IpAddr> {
    let mut bytes = Vec::new();
    for at in (0..text.len()).step_by(8) {
        let word = u32::from_str_radix(text.get(at..at + 8)?, 16).ok()?;
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_sockets_are_read() {
        let text = "  sl  local_address rem_address   st …\n   \
            0: 0100007F:22B8 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1001 0 77 1\n   \
            1: 0100007F:22B9 00000000:0000 01 00000000:00000000 00:00000000 00000000  1001 0 78 1\n   \
            2: broken\n";
        let ours = listeners(text).filter(|found| [77, 78].contains(&found.inode));
        let found: Vec<_> = ours.map(|found| found.address).collect();
        assert_eq!(found, ["127.0.0.1:8888".parse().unwrap()]);
        let six = address_of("00000000000000000000000001000000").unwrap();
        assert_eq!(six, "::1".parse::<IpAddr>().unwrap());
        assert!(address_of("xyz").is_none() && address_of("äää").is_none());
    }
}
